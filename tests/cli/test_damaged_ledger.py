"""Damaged lines of ledgers: the message names a command that mends this very folder."""

import json
import warnings
from pathlib import Path

import pytest

from plywise._util.sealed import seal
from plywise.arena.run import ledger
from plywise.cli.console import plain_warnings

BENCH = {"workloads": {}, "methods": {}, "tracks": [], "trials": 1, "seeds": 1}


@pytest.mark.parametrize(
    ("began", "again"),
    [
        ("plywise bench --workloads quick", "`plywise bench --resume --out {out}` sets"),
        ("plywise demo --seeds 2", "`plywise demo --seeds 2` sets"),
        ("plywise.arena.bench(...)", "`plywise.arena.bench(...)` sets"),
        ("", "The command that wrote them sets"),
    ],
)
def test_a_report_names_the_command_that_runs_damaged_trials_again(plywise, tmp_path, began, again):
    (tmp_path / "bench.json").write_text(seal(json.dumps({**BENCH, "command": began})))
    (tmp_path / "trials.jsonl").write_text("no trial\n")
    code, _, err = plywise("report", str(tmp_path))
    assert code == 1
    assert again.format(out=tmp_path) in err


def test_a_warning_of_ours_shows_no_line_of_our_code():
    with plain_warnings():
        ours = warnings.formatwarning("It is damaged.", RuntimeWarning, ledger.__file__, 7)
        theirs = warnings.formatwarning("Theirs.", UserWarning, str(Path("model.py")), 7)
    assert ours == "plywise: It is damaged.\n"
    assert theirs.startswith("model.py:7: UserWarning: Theirs.")
