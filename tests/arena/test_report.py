"""The report in a real browser, because only a browser can say whether a page works."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plywise.arena import report
from plywise.arena.report import render, table_rows, write_report

NAMES = ["SGD", "AdamW", "Backprop", "ProxProp", "BackMatching", "NLMS", "Consequentialism"]
CHARTS = ["steps", "seconds", "sensitivity", "layers"]
DEADLINE = 10_000  # milliseconds
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


def make_run(name: str, seed: int, *, failing: bool = False) -> dict[str, Any]:
    """A plausible run: exponential decay to a floor, with noise."""
    chance = random.Random(f"{name} {seed}")
    order = NAMES.index(name)
    rate, floor, cost = (
        0.006 + 0.003 * (order * 3 % 7),
        0.004 * 1.9 ** (order * 5 % 7),
        0.004 + 0.0012 * order,
    )
    steps = list(range(0, 401, 5))
    loss = [(2.3 * math.exp(-rate * s) + floor) * math.exp(chance.gauss(0, 0.12)) for s in steps]
    failure = None
    if failing:
        loss = [v if s < 30 else math.nan for s, v in zip(steps, loss, strict=True)][:8]
        steps, failure = steps[:8], "diverged at step 31: loss is nan"
    return {
        "seed": seed,
        "steps": steps,
        "loss": loss,
        "cpu_seconds": [cost * s * chance.uniform(0.97, 1.03) for s in steps],
        "test_accuracy": None if failing else 0.975 - 0.012 * (order * 5 % 7) + chance.gauss(0, 0.004),
        "final_loss": None if failing else loss[-1],
        "failure": failure,
    }


def make_study() -> dict[str, Any]:
    ratios = [10 ** (k / 3 - 2) for k in range(13)]
    layers = [
        "0 Linear 64→64",
        "1 Tanh",
        "2 Linear 64→64",
        "3 Tanh",
        "4 Linear 64→32",
        "5 Tanh",
        "6 Linear 32→10",
    ]
    return {
        "title": "plywise demo: handwritten digits",
        "summary": "Seven ways to train one network on 1,797 handwritten digits, three seeds each.",
        "reading": [
            "ProxProp reached the lowest training loss in as many steps, but each of them costs more.",
            "AdamW was the best of the baselines: 97.1 % of the test digits right.",
            "One run of NLMS diverged; its other two seeds trained to the end.",
        ],
        "command": "plywise demo --seeds 3",
        "created": "2026-11-21T12:00:00+00:00",
        "elapsed_seconds": 48.2,
        "environment": {
            "plywise": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.7",
            "cpu": "AMD EPYC 9654 96-Core Processor",
            "threads": 1,
        },
        "attribution": "Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak (1998), UCI "
        "Machine Learning Repository, CC BY 4.0.",
        "methods": [
            {
                "name": name,
                "settings": f"{name}(tau=1.0) + SGD(lr=5.0, momentum=0.9)",
                "runs": [make_run(name, seed, failing=name == "NLMS" and seed == 1) for seed in range(3)],
                "relative_step_cost": 1 + 0.21 * i,
            }
            for i, name in enumerate(NAMES)
        ],
        "sensitivity": [
            {
                "name": name,
                "default_rate": 5.0 / (i + 1),
                "rates": [5.0 / (i + 1) * ratio for ratio in ratios],
                "final_loss": [
                    None
                    if math.log10(ratio) > 0.5 + 0.25 * i
                    else 0.01 * (i + 1) * 10 ** (abs(math.log10(ratio)) * 1.6 / (1 + 0.3 * i))
                    for ratio in ratios
                ],
            }
            for i, name in enumerate(NAMES)
        ],
        "layers": {
            "names": layers,
            "series": [
                {"name": name, "sizes": [10 ** (-0.12 * i * (6 - depth)) for depth in range(7)]}
                for i, name in enumerate(NAMES)
            ],
            "caption": "",
        },
    }


# Without a browser ---------------------------------------------------------------------------------


def test_table_rows_by_hand():
    def run(accuracy, loss, clock, failure=None):
        return {"test_accuracy": accuracy, "final_loss": loss, "cpu_seconds": clock, "failure": failure}

    study = {
        "methods": [
            {
                "name": "A",
                "relative_step_cost": 1.5,
                "runs": [
                    run(0.90, 0.1, [0.0, 3.0]),
                    run(0.92, 0.4, [0.0, 1.0]),
                    run(0.97, None, [0.0, 2.0, None], "diverged"),
                ],
            },
            {"name": "B", "relative_step_cost": None, "runs": [run(None, math.nan, [], "stopped")]},
            {"name": "C", "runs": [run(0.5, 2.0, [4.0])]},
        ]
    }
    a, b, c = table_rows(study)
    assert a["accuracy_mean"] == pytest.approx(93.0)
    assert a["accuracy_std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert (a["final_loss"], a["cpu_seconds"], a["relative_step_cost"]) == (0.25, 2.0, 1.5)
    assert (a["failures"], a["runs"]) == (1, 3)
    assert b == {
        "name": "B",
        "accuracy_mean": None,
        "accuracy_std": None,
        "final_loss": None,
        "cpu_seconds": None,
        "relative_step_cost": None,
        "failures": 1,
        "runs": 1,
    }
    assert (c["accuracy_mean"], c["accuracy_std"], c["final_loss"], c["cpu_seconds"]) == (
        50.0,
        None,
        2.0,
        4.0,
    )


def test_write_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "new" / "report.html"
    assert write_report(make_study(), target) == target
    before = target.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report({"title": "other"}, target)
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target], "a temporary file was left behind"


def test_module_asks_for_nothing_heavy():
    """Neither torch nor jinja2 is needed until a page is rendered."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'jinja2'} & set(sys.modules))"
    command = [sys.executable, "-c", code, report.__file__]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_page_is_small_and_names_no_address():
    page = render(make_study())
    assert len(page.encode()) < 2_000_000
    # The SVG namespace is a name and uPlot's address stands in its licence comment: neither is loaded.
    page = page.replace("http://www.w3.org/2000/svg", "").replace("https://github.com/leeoniya/uPlot", "")
    assert not re.findall(r"https?://[^\s\"'<]*", page)
    assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=|@import|url\(", page)


# In a browser --------------------------------------------------------------------------------------


def find_browser() -> str | None:
    debian = Path("/usr/bin/chromium")
    if debian.exists():
        return str(debian)
    names = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open the report of a study; afterwards the page must have been silent and offline."""
    visits = []

    def _visit(study: dict[str, Any], **options: Any) -> Any:
        path = write_report(study, tmp_path / f"report{len(visits)}.html")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(DEADLINE)
        page = context.new_page()
        seen = SimpleNamespace(context=context, url=path.as_uri(), requests=[], troubles=[])
        visits.append(seen)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda socket: seen.requests.append(socket.url))
        page.on("console", lambda message: seen.troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.troubles.append(str(error)))
        page.on("dialog", lambda dialog: (seen.troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(seen.url)
        wait_for(page, "document.documentElement.dataset.ready === 'true'")
        return page

    yield _visit
    for seen in visits:
        seen.context.close()
        assert seen.troubles == []
        assert seen.requests == [seen.url]


# A copy is read, because reading the page's own canvas makes Chromium warn on the console.
MEASURE = """([id, k]) => {
  const from = document.querySelector(`#${id} canvas`);
  const found = {inked: 0, faint: 0, coloured: 0, height: 0};
  if (!from) return found;
  const copy = Object.assign(document.createElement('canvas'), {width: from.width, height: from.height});
  const pen = copy.getContext('2d', {willReadFrequently: true});
  pen.drawImage(from, 0, 0);
  const d = pen.getImageData(0, 0, copy.width, copy.height).data;
  const hex = getComputedStyle(document.documentElement).getPropertyValue(`--c${k}`).trim();
  const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  let [top, bottom] = [Infinity, -Infinity];
  for (let i = 0; i < d.length; i += 4) {
    found.inked += d[i + 3] > 0;
    found.faint += d[i + 3] > 25 && d[i + 3] < 45;
    if (d[i] !== r || d[i + 1] !== g || d[i + 2] !== b || d[i + 3] !== 255) continue;
    found.coloured += 1;
    const y = Math.floor(i / 4 / copy.width);
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  found.height = Math.max(0, bottom - top);
  return found;
}"""


def measure(page: Any, chart: str, index: int = 0) -> SimpleNamespace:
    """Count the pixels of a chart: all, those of faint bands, and those in the colour of one method."""
    return SimpleNamespace(**page.evaluate(MEASURE, [chart, index]))


def inked(page: Any, chart: str) -> int:
    return measure(page, chart).inked


def coloured(page: Any, chart: str, index: int) -> int:
    return measure(page, chart, index).coloured


def wait_for(page: Any, expression: str) -> None:
    """Wait until an expression is true on the page.

    Playwright's own `wait_for_function` polls with `eval`, which the policy of the page forbids.
    """
    end = time.monotonic() + DEADLINE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"still not true: {expression}"
        page.wait_for_timeout(20)


def rgb(text: str) -> list[float]:
    if text.startswith("#"):
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in re.findall(r"[\d.]+", text)[:3]]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in rgb(colour)]
        r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


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
        for index in range(report.PALETTE_SIZE):
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
