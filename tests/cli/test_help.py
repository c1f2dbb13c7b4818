"""`plywise help`, completion, and what all commands have in common: JSON, quiet, verbose, help that fits."""

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from plywise import errors
from plywise.cli import app
from plywise.cli.help import find_page, read_topics

ROOT = Path(__file__).parents[2]
TOPICS = read_topics()
COMMANDS = [name for name in app if not name.startswith("-")]


def command_function(name):
    found = app[name]
    return found.default_command


# ---- help ----------------------------------------------------------------------------------------


def test_topics_are_the_sections_of_the_page():
    anchors = re.findall(r"^\(([\w-]+)\)=$", (ROOT / errors.PAGE).read_text("utf-8"), re.MULTILINE)
    assert list(TOPICS) == anchors
    assert [part for topic in TOPICS.values() for part in topic.parts] == [
        name for name, topic in TOPICS.items() if not topic.is_kind
    ]


def test_the_page_goes_into_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {errors.PAGE: f"plywise/{find_page().name}"}


def test_without_a_topic_all_are_listed(plywise):
    code, out, _ = plywise("help")
    assert code == 0
    first = [line.split()[0] for line in out.splitlines() if line.split()]
    assert [word for word in first if word in TOPICS] == list(TOPICS)


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("attach-no-layer", ("finds no layer to handle", "plywise.nn.unroll")),
        ("AttachError", ("a rule and a model do not fit", "finds no layer", "is attached already")),
        ("StateError", ("state-memory", "state-run", "--fresh")),
        ("docs/reference/errors.md#missing-package-error", ("pip install 'plywise[bench]'",)),
    ],
)
def test_a_topic_is_printed(plywise, topic, words):
    code, out, err = plywise("help", topic)
    assert (code, err) == (0, "")
    assert all(word in out for word in words)
    assert "](" not in out


def test_help_on_a_command_is_its_help(plywise):
    assert plywise("help", "demo").out == plywise("demo", "--help").out


def test_a_topic_as_json(plywise):
    found = json.loads(plywise("help", "missing-package-error", "--json").out)
    assert found["name"] == "missing-package-error"
    assert found["text"] == TOPICS["missing-package-error"].text
    assert [one["name"] for one in json.loads(plywise("help", "--json").out)] == list(TOPICS)


def test_a_topic_as_json_has_the_sections_that_its_text_has(plywise):
    found = json.loads(plywise("help", "state-error", "--json").out)
    assert [one["name"] for one in found["sections"]] == list(TOPICS["state-error"].parts)
    printed = plywise("help", "state-error").out
    assert all(one["text"] in printed for one in found["sections"])


def test_the_help_of_a_command_as_json(plywise):
    found = json.loads(plywise("help", "bench", "--json").out)
    assert found["name"] == "bench"
    assert "--budget" in found["text"]


def test_an_unknown_topic_suggests_the_nearest(plywise):
    code, _, err = plywise("help", "attach-twise")
    assert code == 1
    assert "Did you mean attach-twice" in err


def test_the_last_line_of_an_error_is_a_command_that_works(plywise):
    _, _, err = plywise("methods", "info", "nope")
    words = err.splitlines()[-1].removeprefix("More: ").split()
    assert words[:2] == ["plywise", "help"]
    assert plywise(*words[1:]).code == 0


# ---- words that are nearly right -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["bnch"], 'Did you mean "bench"'),
        (["workloads", "fetc", "mnist"], "Did you mean fetch"),
        (["methods", "inf", "ProxProp"], "Did you mean info"),
        (["methods", "ProxPrp"], "Did you mean plywise methods info ProxProp"),
        (["methods", "muon"], "Did you mean plywise methods info Muon"),
        (["workloads", "digits-mpl"], "Did you mean plywise bench --workloads digits-mlp"),
        (["diagnose", "--workload", "digits-mpl"], "Did you mean digits-mlp"),
        (["bench", "--workloads", "digits-mpl"], "Did you mean digits-mlp"),
        (["workloads", "fetch", "minst"], "Did you mean mnist"),
    ],
)
def test_the_nearest_is_suggested(plywise, words, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a bench of the user's own may lie in runs/
    code, out, err = plywise(*words)
    assert code in (1, 2)
    assert hint in out + err


# ---- the help of each command --------------------------------------------------------------------


def examples_of(name):
    """Return the lines of the examples in a command's docstring."""
    text = inspect.getdoc(command_function(name)) or ""
    _, found, rest = text.partition("For example:\n")
    lines = []
    for line in rest.splitlines() if found else ():
        if line and not line.startswith("    "):
            break
        lines.append(line.strip())
    return [line for line in lines if line]


@pytest.mark.parametrize("name", [name for name in COMMANDS if examples_of(name)])
def test_examples_do_not_wrap_in_a_terminal_of_80_columns(plywise, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = [line.strip() for line in plywise(name, "--help").out.splitlines()]
    assert [line for line in examples_of(name) if line not in shown] == []


def test_most_commands_have_examples():
    without = {name for name in COMMANDS if not examples_of(name)}
    assert without <= {"demo", "doctor", "methods", "workloads"}


# ---- quiet and verbose ---------------------------------------------------------------------------


def test_quiet_leaves_the_result(plywise, tmp_path):
    words = ["train", "--epochs", "1", "--batch-size", "500", "--out"]
    loud = plywise(*words, str(tmp_path / "one")).out
    quiet = plywise(*words, str(tmp_path / "two"), "--quiet").out
    assert "epoch 1/1" in loud
    assert "epoch 1/1" not in quiet
    assert "Trained 3 steps" in quiet
    assert "epoch 1/1" in plywise(*words, str(tmp_path / "three")).out  # of that command only


def test_verbose_shows_where_an_error_comes_from():
    run = [sys.executable, "-m", "plywise", "methods", "info", "nope"]
    plain, verbose = (
        subprocess.run([*run, *flag], capture_output=True, text=True, check=False) for flag in ([], ["-v"])
    )
    assert plain.returncode == verbose.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "Traceback" in verbose.stderr
    assert "More: plywise help command-error" in verbose.stderr


# ---- machines ------------------------------------------------------------------------------------


def test_workloads_as_json(plywise):
    from plywise.arena.workloads import HIDDEN, QUICK, WORKLOADS

    found = json.loads(plywise("workloads", "--json").out)
    assert [one["name"] for one in found if not one["seeded"]] == list(WORKLOADS)
    assert {one["name"] for one in found if one["quick"]} == set(QUICK)
    assert all(one["seeded"] or one["steps"] > 0 for one in found)
    assert all(one["metric"] and one["about"] for one in found)
    assert [one["name"] for one in found if one["seeded"]] == [f"hidden-{kind}-N" for kind in HIDDEN]


def test_papers_as_json(plywise):
    from plywise.arena.reproductions import PAPERS

    found = json.loads(plywise("reproduce", "--json").out)
    assert [one["name"] for one in found] == list(PAPERS)
    numbers = {arm["name"]: arm["paper"] for arm in found[0]["experiments"][0]["arms"]}
    assert numbers["BackProp, τ = 10"] == "diverged"
    assert numbers["cg3, τ = 1"] == 0.002


def test_doctor_as_json(plywise, monkeypatch):
    from plywise.cli import doctor

    monkeypatch.setattr(
        doctor, "self_check", lambda: {"NLMS": "OK, loss 1 → 0", "RLS": "it measured nothing"}
    )
    code, out, _ = plywise("doctor", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["well"] is False
    assert found["rules"]["NLMS"].startswith("OK")
    assert "torch" in found["environment"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands_and_their_flags(plywise, shell):
    code, out, _ = plywise("completion", shell)
    assert code == 0
    assert all(name in out for name in (*COMMANDS, "batch-size", "fetch"))


@pytest.mark.skipif(sys.platform == "win32", reason="bash is not there")
def test_completion_is_a_script_that_bash_reads(plywise, tmp_path):
    script = tmp_path / "plywise.bash"
    script.write_text(plywise("completion", "bash").out)
    ask = f"source {script}; COMP_WORDS=(plywise wo); COMP_CWORD=1; _plywise; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["workloads"]
