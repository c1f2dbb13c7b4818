"""The report of a bench as a file: its sources, its size, and its list of missing parts."""

from __future__ import annotations

import html
import json
import re

import pytest
from fake_bench import SPEEDS, make_bench, make_lines, write_bench

from plywise.arena.reports import bench_page
from plywise.arena.reports.bench_page import make_page, write_page
from plywise.arena.scoring.summary import summarize_bench
from plywise.errors import PlywiseError


def test_the_page_is_written_next_to_the_ledger(tmp_path):
    bench = make_bench()
    path, summary = write_page(write_bench(tmp_path / "b", bench, make_lines(bench)))
    assert path == tmp_path / "b" / "report.html"
    text = path.read_text(encoding="utf-8")
    assert bench["command"] in text
    assert summary.conclusions
    assert all(sentence in html.unescape(text) for sentence in summary.conclusions), (
        "and nothing else is told"
    )


def test_a_line_that_is_being_written_is_not_there_yet(tmp_path):
    bench = make_bench()
    folder = write_bench(tmp_path, bench, make_lines(bench))
    before = write_page(folder)[0].read_text(encoding="utf-8")
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"workload": "digits", "met')
    assert write_page(folder)[0].read_text(encoding="utf-8") == before
    with (folder / "trials.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(PlywiseError, match="is not a trial"):
        write_page(folder)


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_trials_missing_from_the_ledger_are_detected(tmp_path, lost):
    bench = make_bench()
    lines = make_lines(bench)
    bench["expected"] = len(lines)
    _, summary = write_page(write_bench(tmp_path, bench, lines[lost:]))
    output = f"The bench is not complete: {len(lines) - lost} of {len(lines)} trials are there."
    assert summary.conclusions[0].startswith(output) == (lost > 0)


def test_a_folder_without_a_bench_is_refused(tmp_path):
    with pytest.raises(PlywiseError, match=r"no bench\.json"):
        write_page(tmp_path)
    for text in ("{", "[]", "null", "{}", '{"workloads": {}}'):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(PlywiseError, match="not the JSON"):
            write_page(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(make_bench()))
    assert "nothing to compare" in write_page(tmp_path)[0].read_text(encoding="utf-8")


def test_the_page_names_no_address_and_loads_nothing():
    bench = make_bench()
    text = make_page(summarize_bench(bench, make_lines(bench)))
    text = text.replace("http://www.w3.org/2000/svg", "").replace("https://github.com/leeoniya/uPlot", "")
    assert not re.findall(r"https?://[^\s\"'<]*", text)
    assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=|@import|url\(", text)


def test_a_large_bench_fits_into_two_megabytes():
    methods = [*SPEEDS, *(f"method-number-{i}" for i in range(13))]
    bench = make_bench(methods, [f"workload-{i}" for i in range(10)])
    lines = make_lines(bench)
    assert len(lines) > 2500
    text = make_page(summarize_bench(bench, lines))
    assert len(text.encode()) < 2_000_000
    assert "trials.jsonl.gz" in text, "with all trials in it"


def test_data_too_large_for_the_page_are_left_out_and_reported(monkeypatch):
    bench = make_bench()
    monkeypatch.setattr(bench_page, "LARGEST", 200_000)
    text = make_page(summarize_bench(bench, make_lines(bench)))
    assert "trials.jsonl.gz" not in text
    assert "too large for this page" in text


def test_missing_parts_are_named():
    bench = make_bench(unfinished=["words: 14 of its trials have not been run."])
    lines = [one for one in make_lines(bench) if (one["workload"], one["method"]) != ("words", "proxprop")]
    text = make_page(summarize_bench(bench, lines))
    notice = text[text.index('id="missing"') : text.index('id="reading-title"')]
    assert "Not finished. words: 14 of its trials have not been run." in notice
    assert "proxprop on words (tuned, 0 of 3 runs)" in notice
    assert "local on words" not in notice, "what does not fit is not missing"
    assert 'id="missing"' not in make_page(summarize_bench(make_bench(), make_lines(make_bench())))
