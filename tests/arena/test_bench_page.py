"""The report of a bench in a real browser."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
from typing import Any

import pytest
from browsing import ATTACK, compute_contrast, count_coloured, count_ink, wait_for
from fake_bench import SPEEDS, WORKLOADS, line, make_bench, make_lines, write_bench

from plywise.arena.reports.bench_page import write_page
from plywise.arena.scoring.ranking import rank_methods
from plywise.arena.scoring.results import gather_results
from plywise.arena.scoring.score import CLOCKS

CHARTS = ["profile", "validation", "loss", "rates", "tuning", "pareto", "layers"]
NAMES = list(SPEEDS)
INDEX = {name: index for index, name in enumerate(NAMES)}


@pytest.fixture
def visit(open_page, tmp_path):
    """Open the report of a bench, with the whole ledger if none is given."""
    count = itertools.count()

    def _visit(bench: Any = None, lines: Any = None, **options: Any) -> Any:
        bench = bench or make_bench()
        lines = make_lines(bench) if lines is None else lines
        return open_page(write_page(write_bench(tmp_path / str(next(count)), bench, lines))[0], **options)

    return _visit


def read_names(page: Any, table: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#{table} tbody th").all_inner_texts()]


def test_every_chart_and_table_shows_every_method(visit):
    page = visit()
    for chart in CHARTS:
        assert count_ink(page, chart) > 3000, chart
        for name in {"proxprop", "adamw"}:
            assert count_coloured(page, chart, INDEX[name]) > 20, (chart, name)
    assert count_coloured(page, "layers", INDEX["local"]) == 0, "it said nothing about layers"
    assert sorted(read_names(page, "results")) == sorted(NAMES)
    field = gather_results(make_bench(), make_lines(make_bench()))
    assert read_names(page, "standing") == [place.method for place in rank_methods(field, "tuned", "cpu")]
    assert "1 of 3 failed" in page.locator("#curves-legend button", has_text="nlms").inner_text()


def test_a_page_opens_with_its_verdict_the_ranking_and_four_lines(visit):
    page = visit(viewport={"width": 360, "height": 740})
    assert "proxprop needs 0." in page.locator("#verdict").inner_text()
    tops = [
        page.locator(part).bounding_box()["y"]
        for part in ("#verdict", "#ranking", "#profile", ".bar", "#standing")
    ]
    assert tops == sorted(tops)
    assert read_names(page, "ranking") == read_names(page, "standing")
    areas = [text.split()[0] for text in page.locator("#ranking td:last-child").all_inner_texts()]
    assert areas == sorted(areas, reverse=True), "as they are ranked"
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#ranking'))") == 0
    shown = page.locator("#standing-legend button[aria-pressed='true']")
    assert sorted(shown.all_inner_texts()) == ["adamw", "nlms", "proxprop", "sgd"]
    assert count_coloured(page, "validation", INDEX["bad"]) == 0
    page.locator("#standing-legend").get_by_role("button", name="All").click()
    assert count_coloured(page, "validation", INDEX["bad"]) > 20
    page.locator("#standing-legend").get_by_role("button", name="First 4").click()
    assert shown.count() == 4


def test_a_phone_breaks_no_name_of_ours(visit):
    name = "consequentialism"
    bench, lines = make_bench(), make_lines(make_bench())
    bench, lines = json.loads(json.dumps([bench, lines]).replace("proxprop", name))
    page = visit(bench, lines, viewport={"width": 360, "height": 740})
    rows = page.evaluate(
        """name => [...document.querySelectorAll(".ranking .name")]
          .filter(e => e.textContent.includes(name))
          .map(e => {
            const words = document.createRange();
            words.selectNodeContents(e);
            return new Set([...words.getClientRects()].filter(e => e.width > 5).map(e => e.top)).size;
          })""",
        name,
    )
    assert rows
    assert set(rows) == {1}
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#ranking'))") == 0


def test_captions_are_one_sentence(visit):
    for caption in visit().locator("figcaption").all_inner_texts():
        assert caption.endswith(".")
        assert ". " not in caption, caption


def test_a_target_without_a_loose_one_mentions_none(visit):
    assert ", loose 0." in visit().locator("#workload-about").inner_text()
    page = visit({**make_bench(), "chosen": True})
    assert "Target: " in page.locator("#workload-about").inner_text()
    assert "loose" not in page.locator("#workload-about").inner_text()


def test_the_axis_of_a_curve_ends_after_the_target_is_reached(visit):
    page = visit()
    page.select_option("#clock", "steps")
    page.locator("#curves-legend").get_by_role("button", name="None").click()
    page.locator("#curves-legend button[data-name='proxprop']").click()
    over = page.locator("#validation .u-over")
    over.scroll_into_view_if_needed()
    over.hover(position={"x": over.bounding_box()["width"] - 2, "y": 80})
    tip = page.locator("#validation .tip b")
    tip.wait_for(state="visible")
    reached = page.locator("#results tbody tr", has_text="proxprop").locator("td").nth(1).inner_text()
    assert float(reached.split()[0]) <= float(tip.inner_text().split()[1]) < 400


def test_track_clock_and_workload_are_chosen(visit):
    page = visit()
    field = gather_results(make_bench(), make_lines(make_bench()))
    for track, clock in itertools.product(("defaults", "tuned"), CLOCKS):
        page.select_option("#track", track)
        page.select_option("#clock", clock)
        assert read_names(page, "standing") == [place.method for place in rank_methods(field, track, clock)]
    assert "target" in page.locator("#results thead").inner_text().lower()
    for workload in WORKLOADS:
        page.select_option("#workload", workload)
        assert page.locator("#workload-name").inner_text() == workload
        assert f"What {workload} are for." in page.locator("#workload-about").inner_text()
        assert all(count_ink(page, chart) > 3000 for chart in CHARTS)
    assert "local" not in read_names(page, "results")
    assert "Does not fit: local" in page.locator("#workload-about").inner_text()


def test_cells_show_the_computed_values(visit):
    page = visit()
    page.select_option("#clock", "steps")
    row = page.locator("#results tbody tr", has_text="proxprop")
    assert row.locator("td").nth(0).inner_text() == "3 of 3"
    bad = page.locator("#results tbody tr", has_text="bad")
    assert bad.locator("td").nth(1).inner_text() == "missed"
    assert bad.locator("td").nth(2).inner_text().startswith("≥")
    null = page.locator("#standing tbody tr", has_text="sgd-again")
    assert null.locator("td").nth(0).inner_text() == "–"


def test_a_bench_without_layer_data_has_no_layer_chart(visit):
    lines = make_lines(make_bench())
    for one in lines:
        del one["layers"]
    page = visit(None, lines)
    assert not page.locator("#layers").is_visible()
    bench = make_bench()
    bench["workloads"]["convs"]["layers"] = {"names": ["0", "2"], "effective rate": [0.1, 0.3]}
    shown = visit(bench, lines)
    assert not count_ink(shown, "layers")
    shown.select_option("#workload", "convs")
    assert count_coloured(shown, "layers", len(NAMES)) > 20
    assert "before training ends at 0.3" in shown.locator("#layers").get_attribute("aria-label")
    assert page.locator("#pareto canvas").is_visible()


def test_headings_sort_and_stay_sorted(visit):
    page = visit()
    page.locator("#results").get_by_role("button", name="Final validation").click()
    values = (
        "[...document.querySelectorAll('#results tbody tr')].map(r => parseFloat(r.cells[4].dataset.value))"
    )
    rising = page.evaluate(values)
    assert rising == sorted(rising) != sorted(rising, reverse=True)
    page.select_option("#workload", "convs")
    assert page.evaluate(values) == sorted(page.evaluate(values)) != rising
    page.locator("#results").get_by_role("button", name="Final validation").click()
    assert page.evaluate(values) == sorted(page.evaluate(values), reverse=True)
    page.select_option("#workload", "digits")
    assert page.evaluate(values) == rising[::-1]
    page.locator("#standing").get_by_role("button", name="Method").click()
    assert read_names(page, "standing") == sorted(NAMES)


def test_legends_hide_methods_everywhere(visit):
    page = visit()
    page.locator("#standing-legend button", has_text="proxprop").click()
    assert all(count_coloured(page, chart, INDEX["proxprop"]) == 0 for chart in CHARTS)
    assert all(count_coloured(page, chart, INDEX["adamw"]) > 20 for chart in CHARTS)
    pressed = page.locator("#curves-legend button", has_text="proxprop").get_attribute("aria-pressed")
    assert pressed == "false"
    page.select_option("#workload", "convs")
    assert count_coloured(page, "validation", INDEX["proxprop"]) == 0, "still hidden on another workload"
    page.locator("#curves-legend").get_by_role("button", name="None").click()
    assert page.locator(".chart .empty").count() == len(CHARTS)
    page.locator("#curves-legend").get_by_role("button", name="All").click()
    assert all(count_coloured(page, chart, INDEX["proxprop"]) > 20 for chart in CHARTS)


def test_hovering_shows_the_values(visit):
    page = visit()
    page.select_option("#clock", "steps")
    for chart, start, output in (
        ("validation", "step 400", "adamw"),
        ("tuning", "best of 8", "adamw"),
        ("profile", "within 4× of the quickest", "3 of 3"),
    ):
        over = page.locator(f"#{chart} .u-over")
        over.scroll_into_view_if_needed()
        over.hover(position={"x": over.bounding_box()["width"] - 2, "y": 80})
        tip = page.locator(f"#{chart} .tip")
        tip.wait_for(state="visible")
        assert tip.locator("b").inner_text() == start
        assert output in tip.inner_text()


def test_downloads_hold_all_trials(visit, tmp_path):
    page = visit()
    lines = make_lines(make_bench())
    for name in ("standing.csv", "trials.csv", "trials.jsonl"):
        with page.expect_download() as download:
            page.locator(f".downloads a[data-name='{name}']").click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    back = [json.loads(text) for text in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    assert back == lines
    table = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text(encoding="utf-8"))))
    assert len(table) == len(lines)
    assert "proxprop" in (tmp_path / "standing.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(visit, width):
    page = visit(viewport={"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("scrollX") == 0
    tables = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert max(tables) == 0 or width < 1000, "whole tables are seen where there is room"


def test_light_and_dark_are_legible(visit):
    page = visit(color_scheme="light")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        wait_for(page, f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        style = "s => getComputedStyle(document.querySelector(s))"
        ground = page.evaluate(f"({style})('body').backgroundColor")
        for selector in (
            "body",
            ".lead",
            ".small",
            ".miss",
            ".bar label",
            ".null .name",
            "#workload-about",
            "thead button",
        ):
            assert compute_contrast(page.evaluate(f"s => ({style})(s).color", selector), ground) >= 4.5, (
                scheme,
                selector,
            )
        raised = page.evaluate(f"({style})('select').backgroundColor")
        assert compute_contrast(page.evaluate(f"({style})('select').color"), raised) >= 4.5
        assert all(count_coloured(page, chart, INDEX["proxprop"]) > 20 for chart in CHARTS)


def test_paper_is_light_and_carries_the_charts(visit):
    page = visit(color_scheme="dark")
    screen = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--c0')")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--c0')") != screen
    assert all(count_coloured(page, chart, INDEX["proxprop"]) > 20 for chart in CHARTS)
    page.evaluate("dispatchEvent(new Event('afterprint'))")


def poison(value: Any) -> Any:
    if isinstance(value, dict):
        return {item: poison(inner) for item, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return f"{value} {ATTACK}" if isinstance(value, str) else value


def test_hostile_text_does_nothing(visit):
    bench = make_bench([ATTACK, "__proto__", "sgd"], [ATTACK, "constructor"])
    lines = make_lines(bench)
    for name in ("title", "command", "environment", "commit", "device"):
        bench[name] = poison(bench[name])
    bench["refused"] = [{"workload": ATTACK, "method": "other", "reason": ATTACK}]
    bench["unfinished"] = [ATTACK]
    for one in (*bench["workloads"].values(), *bench["methods"].values()):
        one["about"] = ATTACK
    bench["environment"][ATTACK] = ATTACK
    lines[0].update(failure=ATTACK, numbers={"lr": 0.1, ATTACK: 1.0})
    for one in lines:
        if one["layers"]:
            one["layers"] = {"names": [ATTACK, "b", "c"], ATTACK: [1.0, 2.0, 3.0]}
    page = visit(bench, lines, viewport={"width": 360, "height": 740})
    assert page.locator("script").count() == 3
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert ATTACK in page.locator("h1").inner_text()
    page.select_option("#workload", "constructor")
    assert sorted(read_names(page, "results")) == sorted([ATTACK, "__proto__", "sgd"])
    assert all(count_ink(page, chart) > 1000 for chart in CHARTS)


def test_browser_refuses_scripts_that_are_not_ours(browser, tmp_path):
    """The second defence: a foreign script in the page does not run."""
    bench, path = make_bench(), tmp_path / "bad.html"
    text = write_page(write_bench(tmp_path, bench, make_lines(bench)))[0].read_text("utf-8")
    path.write_text(text.replace("<main>", "<main><script>document.title = 'taken'</script>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    wait_for(page, "document.documentElement.dataset.ready === 'true'")
    assert page.title() == bench["title"]
    page.close()


def test_charts_follow_the_window(visit):
    page = visit()
    page.set_viewport_size({"width": 360, "height": 740})
    wait_for(page, "[...document.querySelectorAll('canvas')].every(canvas => canvas.width < 360)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_bad_numbers_do_not_break_the_page(visit):
    bench, lines = make_bench(), make_lines(make_bench())
    for one in lines:
        if one["method"] == "adamw":  # a loss that explodes, an error of nothing at all
            one["loss"] = [2.3, *([1e30] * (len(one["loss"]) - 1))]
            one["validation"] = [0.9, *([0.0] * (len(one["validation"]) - 1))]
        if one["method"] == "local":
            one["loss"] = [None] * len(one["loss"])
        if one["layers"]:
            one["layers"]["backward"] = [0.0, None, 1e-300]
        if one["method"] == "nlms":
            one.update(
                steps=[], loss=[], validation=[], cpu=[], wall=[], test=None, peak_mib=None, layers=None
            )
            one["failure"] = "ValueError before the first step: nothing works"
        if one["method"] == "bad":
            one["test"] = None
    page = visit(bench, lines)
    for clock in CLOCKS:
        page.select_option("#clock", clock)
        assert all(count_ink(page, chart) > 1000 for chart in CHARTS)
    nlms = page.locator("#results tbody tr", has_text="nlms").locator("td").all_inner_texts()
    assert (nlms[0], nlms[1], nlms[3], nlms[5]) == ("0 of 3\n3 failed", "missed", "failed", "–")


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "no lines",
        "only tuning",
        "one method",
        "one trial",
        "all failed",
        "no baseline",
        "null alone",
    ],
)
def test_partial_benches_are_still_pages(visit, kind):
    bench = {
        "empty": lambda: make_bench([], []),
        "one method": lambda: make_bench(["proxprop"], ["digits"]),
        "no baseline": lambda: make_bench(["proxprop", "nlms"]),
        "null alone": lambda: make_bench(["sgd-again"]),
    }.get(kind, make_bench)()
    lines = make_lines(bench)
    if kind == "no lines":
        lines = []
    elif kind == "only tuning":
        lines = [one for one in lines if one["purpose"] == "tuning"]
    elif kind == "one trial":
        lines = [line("digits", "sgd", "final", seed=100)]
    elif kind == "all failed":
        nothing = {"steps": [], "loss": [], "validation": [], "cpu": [], "wall": [], "layers": None}
        lines = [
            {**one, **copy.deepcopy(nothing), "failure": "OSError: no disk", "test": None} for one in lines
        ]
    page = visit(bench, lines)
    assert page.locator("h1").inner_text() == bench["title"]
    assert len(page.locator(".reading li").all()) >= 1
    finals = {one["method"] for one in lines if one["purpose"] == "final" and one["workload"] == "digits"}
    assert set(read_names(page, "results")) == finals
    assert (page.locator("#missing").count() == 1) == (kind in ("no lines", "only tuning", "one trial"))


def test_page_without_javascript(browser, tmp_path):
    bench = make_bench()
    path, _ = write_page(write_bench(tmp_path, bench, make_lines(bench)))
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert page.locator("#failures tbody tr").count() > 0
    with page.expect_download() as download:
        page.locator(".downloads a").first.click()
    assert download.value.suggested_filename == "standing.csv.gz"
    context.close()


def test_a_long_bench_of_one_workload_can_be_read(visit):
    """Twenty methods: colours repeat, dashes do not, and every one has its button."""
    methods = [*SPEEDS, *(f"method-number-{i}" for i in range(13))]
    bench = make_bench(methods, ["digits"])
    page = visit(bench, make_lines(bench), viewport={"width": 360, "height": 740})
    assert page.locator("#curves-legend button[data-name]").count() == 20
    look = "p => p.style.stroke + p.getAttribute('stroke-dasharray')"
    looks = page.evaluate(f"[...document.querySelectorAll('#curves-legend path')].map({look})")
    assert len(set(looks)) == 20
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
