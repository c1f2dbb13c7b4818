"""The report as data and as a file."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
from fake_study import make_study

from plywise.arena.demo import report
from plywise.arena.demo.report import render, table_rows, write_report


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

    monkeypatch.setattr(os, "replace", broken)
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
