"""The report in a real browser, because only a browser can say whether a page works."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from typing import Any

import pytest
from browsing import ATTACK, coloured, contrast, inked, measure, wait_for
from fake_study import NAMES, make_study

from plywise.arena.demo.report import render, table_rows, write_report
from plywise.arena.reports.page import PALETTE_SIZE

CHARTS = ["steps", "seconds", "sensitivity", "layers"]


@pytest.fixture
def visit(open_page, tmp_path):
    """Open the report of a study."""
    count = itertools.count()

    def _visit(study: dict[str, Any], **options: Any) -> Any:
        return open_page(write_report(study, tmp_path / f"report{next(count)}.html"), **options)

    return _visit


def test_every_chart_draws_every_method(visit):
    page = visit(make_study())
    for chart in CHARTS:
        assert inked(page, chart) > 3000, chart
        assert (measure(page, chart).faint > 1000) == (chart in ("steps", "seconds")), "bands across seeds"
        for index, name in enumerate(NAMES):
            assert coloured(page, chart, index) > 20, (chart, name)
        label = page.locator(f"#{chart}").get_attribute("aria-label")
        assert all(name in label for name in NAMES)
    assert page.locator("#curves-legend button").count() == len(NAMES)
    assert "1 of 3 failed" in page.locator("#curves-legend button", has_text="NLMS").inner_text()
    assert "diverged" in page.locator("#sensitivity-legend button", has_text="SGD").inner_text()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(visit, width):
    page = visit(make_study(), viewport={"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("scrollX") == 0
    table = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
    assert table == [0] or width < 720, "the whole table is seen where there is room"
    boxes = [page.locator(f"#{chart} canvas").bounding_box() for chart in ("steps", "seconds")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width >= 720), "side by side only where there is room"


def test_charts_follow_the_window(visit):
    page = visit(make_study())
    page.set_viewport_size({"width": 360, "height": 740})
    wait_for(page, "[...document.querySelectorAll('canvas')].every(canvas => canvas.width < 360)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_light_and_dark_are_different_and_legible(visit):
    page = visit(make_study(), color_scheme="light")
    grounds = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        wait_for(page, f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        style = "s => getComputedStyle(document.querySelector(s))"
        ground = page.evaluate(f"({style})('body').backgroundColor")
        grounds[scheme] = ground
        for selector in (
            "body",
            "h1",
            ".lead",
            "caption",
            "figcaption",
            "td.failed",
            "#download",
            "thead button",
        ):
            text = page.evaluate(f"s => ({style})(s).color", selector)
            assert contrast(text, ground) >= 4.5, (scheme, selector)
        for index in range(PALETTE_SIZE):
            script = "k => getComputedStyle(document.documentElement).getPropertyValue(`--c${k}`).trim()"
            assert contrast(page.evaluate(script, index), ground) >= 3, (scheme, index)
        # The open page is repainted too, not only its text.
        assert all(coloured(page, chart, index) > 20 for chart in CHARTS for index in range(len(NAMES)))
    assert contrast(grounds["light"], grounds["dark"]) > 10


def test_legend_hides_a_method_everywhere(visit):
    page = visit(make_study())
    button = page.locator("#curves-legend button", has_text="AdamW")
    assert all(coloured(page, chart, 1) > 20 for chart in CHARTS)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert page.locator("#layers-legend button", has_text="AdamW").get_attribute("aria-pressed") == "false"
    assert all(coloured(page, chart, 1) == 0 for chart in CHARTS)
    assert all(coloured(page, chart, 0) > 20 for chart in CHARTS)
    button.click()
    assert all(coloured(page, chart, 1) > 20 for chart in CHARTS)
    for button in page.locator("#layers-legend button").all():
        button.click()
    assert page.locator(".chart .empty").count() == len(CHARTS)


def test_heading_sorts_the_table(visit):
    study = make_study()
    page = visit(study)

    def shown() -> list[str]:
        return [text.strip() for text in page.locator("#results tbody th").all_inner_texts()]

    assert shown() == NAMES
    page.get_by_role("button", name="Test accuracy").click()
    rising = [row["name"] for row in sorted(table_rows(study), key=lambda row: row["accuracy_mean"])]
    assert shown() == rising != NAMES
    assert page.locator("#results thead th").nth(1).get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Test accuracy").click()
    assert shown() == rising[::-1]
    page.get_by_role("button", name="Method").click()
    assert shown() == sorted(NAMES, key=str.lower)
    assert page.locator("#results thead th[aria-sort]").count() == 1


def test_hovering_tells_the_values(visit):
    study = make_study()
    page = visit(study)
    over = page.locator("#steps .u-over")
    over.scroll_into_view_if_needed()
    over.hover(position={"x": over.bounding_box()["width"] - 2, "y": 60})
    tip = page.locator("#steps .tip")
    tip.wait_for(state="visible")
    median = statistics.median(run["loss"][-1] for run in study["methods"][0]["runs"])
    assert tip.locator("b").inner_text() == "step 400"
    assert f"{float(f'{median:.3g}'):g}" in tip.locator("div", has_text="SGD").inner_text()
    rates = page.locator("#sensitivity .u-over")
    rates.scroll_into_view_if_needed()
    rates.hover(position={"x": rates.bounding_box()["width"] * 0.97, "y": 60})
    wait_for(page, "document.querySelector('#sensitivity .tip').innerText.includes('diverged')")


def test_raw_numbers_come_back(visit, tmp_path):
    study = make_study()
    page = visit(study)
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "study.json")
    back = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    study["methods"][5]["runs"][1]["loss"][6:] = [None, None]  # nan has no JSON
    assert back == study


def test_hostile_text_does_nothing(visit):
    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {item: poison(inner, item) for item, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner, key) for inner in value]
        return f"{value} {ATTACK}" if isinstance(value, str) else value

    study = poison(make_study())
    study["environment"] = {ATTACK: ATTACK}
    study["methods"][0]["name"] = study["sensitivity"][0]["name"] = "__proto__"
    study["methods"][2]["runs"][0]["failure"] = ATTACK
    page = visit(study, viewport={"width": 360, "height": 740})
    assert page.locator("h1").inner_text() == f"plywise demo: handwritten digits {ATTACK}"
    assert page.locator("script").count() == 3
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#curves-legend button").nth(1).inner_text() == f"AdamW {ATTACK}"
    page.locator("#layers .u-over").hover()
    page.locator("#layers .tip").wait_for(state="visible")
    assert all(inked(page, chart) > 3000 for chart in CHARTS)


def test_browser_refuses_scripts_that_are_not_ours(browser, tmp_path):
    """The second wall: a script that got into the page all the same is not run."""
    path = tmp_path / "bad.html"
    path.write_text(render(make_study()).replace("<main>", "<main><script>document.title = 'taken'</script>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    wait_for(page, "document.documentElement.dataset.ready === 'true'")
    assert page.title() == "plywise demo: handwritten digits"
    page.close()


def test_bad_numbers_do_not_break_the_page(visit):
    study = make_study()
    for run in study["methods"][0]["runs"]:  # every run failed at once, nothing was measured
        run.update(steps=[0], loss=[math.nan], cpu_seconds=[None], test_accuracy=None, final_loss=math.inf)
        run["failure"] = "diverged at step 0: loss is nan"
    study["methods"][1]["runs"][0]["loss"][10:20] = [None] * 10
    study["methods"][2]["runs"][0]["loss"][-3:] = [1e30, -math.inf, 1e300]
    study["methods"][3]["runs"] = []
    study["methods"][3]["relative_step_cost"] = None
    for run in study["methods"][4]["runs"]:
        run["loss"][-5:] = [0.0] * 5
    study["sensitivity"][0]["final_loss"] = [None] * 13
    study["sensitivity"][1]["default_rate"] = None
    study["sensitivity"][2]["final_loss"][3] = 1e38
    study["layers"]["series"][0]["sizes"] = [0.0] * 7
    study["layers"]["series"][1]["sizes"] = [math.nan, None, 1e-38, 1e-300, 1.0, 1.0, 1.0]
    study["layers"]["series"][2]["sizes"] = []
    page = visit(copy.deepcopy(study))
    assert all(inked(page, chart) > 3000 for chart in CHARTS)
    assert all(coloured(page, "steps", index) > 20 for index in (1, 2, 4, 5, 6))
    assert measure(page, "steps", 6).height > 60, "a run that explodes flattens the others"
    assert measure(page, "sensitivity", 6).height > 60, "a rate that explodes flattens the others"
    cells = page.locator("#results tbody tr").first.locator("td").all_inner_texts()
    assert cells[:3] == ["–", "–", "–"]
    assert cells[4] == "3 of 3"
    for order in range(2):
        page.get_by_role("button", name="Test accuracy").click()
        last = page.locator("#results tbody th").all_inner_texts()[-2:]
        assert {text.strip() for text in last} == {"SGD", "ProxProp"}, f"missing goes last ({order})"


@pytest.mark.parametrize("study", [{"title": "Nothing yet"}, {"title": "Empty", "methods": [], "layers": {}}])
def test_empty_study_is_still_a_page(visit, study):
    page = visit(study)
    assert page.locator("h1").inner_text() == study["title"]
    assert page.locator("canvas").count() == 0


def test_page_without_javascript(visit, browser, tmp_path):
    path = write_report(make_study(), tmp_path / "plain.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert page.locator("#results tbody tr").count() == len(NAMES)
    assert not page.locator("#download").is_visible()
    context.close()


def test_paper_is_light_and_carries_the_charts(visit):
    page = visit(make_study(), color_scheme="dark")
    screen = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--c0')")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    paper = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--c0')")
    assert paper != screen
    assert all(coloured(page, chart, 0) > 20 for chart in CHARTS)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--c0')") == screen
