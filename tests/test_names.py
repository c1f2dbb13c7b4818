"""One table holds all names: with a file and one line of it a rule is everywhere that rules are listed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plywise as pw
from plywise.registry.names import NAMES, PART
from plywise.registry.stub import PATH, make_stub

SOURCE = Path(pw.__file__).parent
CONTRACT = Path(__file__).parent / "contract"

LINE = '    _make_rule("Twice", "twice", {"factor": (1.0, 4.0, 2.0)}),\n'
ASK = """
import io, json, sys
from contextlib import redirect_stdout

import plywise as pw
from plywise.arena.methods import METHODS, find_method
from plywise.cli import main

listed = io.StringIO()
with redirect_stdout(listed):
    try:
        main(["methods", "--json"])
    except SystemExit:
        pass
sys.path.insert(0, sys.argv[1])
from registry import CASES

print(json.dumps({
    "attribute": hasattr(pw, "Twice") and "Twice" in pw.__all__,
    "command": "Twice" in [card["name"] for card in json.loads(listed.getvalue())],
    "arena": "twice" in METHODS and [r.low for r in [find_method("twice").space["factor"]]] == [1.0],
    "contract": "twice" in [case.name for case in CASES],
}))
"""


def ask(folder):
    """Where a copy of plywise lists the rule `Twice`."""
    run = subprocess.run(
        [sys.executable, "-c", ASK, str(CONTRACT)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_adding_a_rule_is_a_file_and_a_line(tmp_path):
    copy = tmp_path / "plywise"
    shutil.copytree(SOURCE, copy)  # with what Python has compiled, which takes it seconds
    rule = (copy / "rules" / "gradient_amplification.py").read_text("utf-8")
    (copy / "rules" / "twice.py").write_text(rule.replace("GradientAmplification", "Twice"), "utf-8")
    table = copy / "registry" / "names.py"
    without = table.read_text("utf-8")
    table.write_text(without.replace("NAMES = (\n", "NAMES = (\n" + LINE), "utf-8")
    assert ask(tmp_path) == dict.fromkeys(("attribute", "command", "arena", "contract"), True)
    table.write_text(without, "utf-8")
    assert ask(tmp_path) == dict.fromkeys(("attribute", "command", "arena", "contract"), False)


@pytest.mark.parametrize(
    "entry", [entry for entry in NAMES if entry.kind != PART], ids=lambda entry: entry.name
)
def test_each_method_is_somewhere_in_the_arena_or_the_table_says_why_not(entry):
    assert [bool(place) for place in (entry.method, entry.workload, entry.absence)].count(True) == 1


def test_names_are_there_once():
    names = [entry.name for entry in NAMES]
    assert len(set(names)) == len(names)


def test_type_checkers_see_the_table():
    assert PATH.read_text("utf-8") == make_stub(), "run python -m plywise.registry.stub"


def test_type_checkers_see_that_a_module_lacks_a_name():
    files = [path for path in SOURCE.rglob("*.py") if not path.with_suffix(".pyi").exists()]
    tops = {path: ast.parse(path.read_text("utf-8")).body for path in files}
    hiding = [
        path
        for path, top in tops.items()
        if any(line.startswith(("def __getattr__", "__getattr__ =")) for line in map(ast.unparse, top))
    ]
    assert hiding == [], "put __getattr__ below `if not TYPE_CHECKING:`"
