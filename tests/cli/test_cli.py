"""The command line: its output, its errors, and its exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from plywise.cli import demo as demo_command
from plywise.cli.console import table
from plywise.errors import MORE
from plywise.registry.card import STATUSES
from plywise.registry.find import ROOMS, RULES
from processes import DEADLINE, ForkedCommand

NAMES = [name for names in ROOMS.values() for name in names]

MODULE = """
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x):
            return {"mask": x > 0, "logits": self.layer(x)}

    return Two()

def make():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))

ready = make()

def boom():
    raise ValueError("no weights [bold]today")

def leave():
    raise SystemExit(3)

def three():
    return 3

def wants(size):
    return make()

number = 3
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


@pytest.fixture
def project(tmp_path, user_module):
    """Make a folder with a user's modules, and change to it."""
    user_module("mine", MODULE)
    user_module("needy", "import a_package_that_is_not_there")
    user_module("broken", "\n\n1 / 0")
    user_module("slip", "def make(:")
    return tmp_path


def test_a_closed_output_ends_the_command_silently():
    for words in (["methods"], ["methods", "--json"], ["help"]):
        with subprocess.Popen(
            [sys.executable, "-m", "plywise", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as command:
            command.stdout.close()
            assert command.stderr.read() == ""
            assert command.wait(timeout=120) == 128 + signal.SIGPIPE


# ---- the start -----------------------------------------------------------------------------------


def test_help_is_answered_without_torch():
    code = """
import sys
import plywise.cli
assert not {"torch", "numpy", "jinja2"} & set(sys.modules), "after import"
commands = "demo", "explain", "bench", "diagnose", "reproduce", "train", "pipeline", "methods info"
for words in ("--help", *(f"{command} --help" for command in commands), ""):
    try:
        plywise.cli.main(words.split())
    except SystemExit as left:
        assert left.code == 0, (words, left.code)
assert not {"torch", "numpy", "jinja2"} & set(sys.modules), "after --help"
import plywise.arena.methods, plywise.arena.workloads
assert "torch" not in sys.modules, "after names are listed"
"""
    output = re.sub(r"\s+", " ", python(code))
    for command in ("demo", "doctor", "explain", "methods", "--seeds", "--no-open", "--batch-size"):
        assert command in output
    for words in ("plywise bench my.module:make_model", "--budget", "--resume", "quick, standard"):
        assert words in output
    for words in (
        "plywise train --rule ProxProp",
        "torchrun --nproc-per-node 2 -m plywise pipeline",
        "--cuts",
    ):
        assert words in output


def test_installed_command_says_its_version():
    command = Path(sys.executable).with_name("plywise")
    done = subprocess.run([command, "--version"], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == python("import plywise; print(plywise.__version__)").strip()


@pytest.mark.parametrize("words", [["nonsense"], ["demo", "--seeds", "x"], ["explain"], ["demo", "--nope"]])
def test_wrong_usage_exits_2(plywise, words):
    code, out, err = plywise(*words)
    assert code == 2
    assert out + err


# ---- methods -------------------------------------------------------------------------------------


def test_methods_are_a_line_each(plywise):
    code, out, _ = plywise("methods")
    assert code == 0
    lines = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in NAMES]
    assert [line[0] for line in lines] == NAMES
    assert all(line[-2].isdigit() and line[-1] in STATUSES and len(line) > 4 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_info_shows_the_whole_card(plywise, name):
    code, out, _ = plywise("methods", "info", name.lower())
    assert code == 0
    assert out.startswith(name)
    for heading in ("idea", "equation", "use when", "not when", "layers", "cost", "settings", "status"):
        assert f"\n{heading} " in out
    for heading in ("source", "code", "results", "limits", "example"):
        assert f"\n{heading} " in out
    assert "``" not in out


def test_cards_as_json(plywise):
    _, out, _ = plywise("methods", "--json")
    cards = json.loads(out)
    assert [card["name"] for card in cards] == NAMES
    _, out, _ = plywise("methods", "info", "ProxProp", "--json")
    card = json.loads(out)
    assert {"room": "rules", **card} == cards[1]
    tau = {"name": "tau", "default": "1.0", "meaning": "", "range": "0.01 to 100"}
    assert card["hyper_parameters"][0] | {"meaning": ""} == tau


def test_unknown_rule(plywise):
    code, out, err = plywise("methods", "info", "backmaching")
    assert (code, out) == (1, "")
    assert "Did you mean BackMatching" in err
    assert err.count("\n") == 2
    assert "\nMore: plywise help command-error" in err


def test_an_output_without_unicode_gets_question_marks_and_escaped_json(plywise):
    code = """
from plywise.cli import main
for words in ("methods info proxprop --json", "methods info proxprop"):
    try:
        main(words.split())
    except SystemExit as left:
        assert left.code == 0
    print("----")
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    found, card, _ = done.stdout.split(b"----\n")
    assert b"?" in card
    assert json.loads(found) == json.loads(plywise("methods", "info", "proxprop", "--json").out)


def test_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback(tmp_path):
    (tmp_path / "cyclopts.py").write_text("raise KeyboardInterrupt")
    search = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "plywise", "help"],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (130, "\nInterrupted. Nothing was changed.\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no disk that is always full")
def test_an_output_that_is_full_is_named():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "plywise", "help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("plywise: standard output does not fit on its disk, which is full")


@pytest.mark.parametrize("width", [200, 80, 40, 24])
def test_a_table_breaks_no_word_in_a_narrow_terminal(width):
    cells = ("features.0", "Conv2d", "1.6e-5", "waits for its first batch", "4.3/144")
    shown = table("layer", "type", "backward", "why", "rank", title="A model", numbers=("backward", "rank"))
    shown.add_row(*cells)
    shown.add_row("head", "Linear", "0.0023", "", "14/118")
    screen = Console(file=StringIO(), width=width)
    screen.print(shown)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert {word for cell in cells for word in cell.split()} < set(words)
    assert words.count("features.0") == {200: 1, 80: 1, 40: 2, 24: 4}[width], "each piece names its rows"
    assert words.count("model") == 1


# ---- explain -------------------------------------------------------------------------------------


def test_explain_ones_own_model(plywise, project):
    code, out, _ = plywise("explain", "mine:make", "--rule", "proxprop", "--set", "tau=2", "--layers", "0")
    assert code == 0
    assert "tau=2" in out
    assert out.splitlines()[0].startswith("67 % of ")
    table = [line for line in out.splitlines()[1:] if line.split()[:1] and line.split()[0].isdigit()]
    rows = {line.split()[0]: line for line in table}
    assert list(rows) == ["0", "2", "3"]
    assert "ProxProp" in rows["0"]
    assert "left to the optimizer" in rows["2"]
    assert "left to the optimizer" in rows["3"]
    code, out, _ = plywise("explain", "mine:ready", "--rule", "NLMS", "--batch-size", "7")
    assert code == 0
    assert "4×8" in out


@pytest.mark.parametrize("rule", ["ProxProp", "Foof"])
def test_explain_a_convnet_with_a_batch(plywise, project, rule):
    words = ("explain", "mine:conv", "--rule", rule, "--batch-size", "16")
    assert "after 1st batch" in plywise(*words).out
    out = plywise(*words, "--shape", "2,6,6").out
    assert "after 1st batch" not in out
    assert "also used by" not in out
    found = json.loads(plywise(*words, "--shape", "2x6x6", "--json").out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["0"]["cost"] > 0
    assert rows["0"]["passes"] == rows["4"]["passes"] == 1
    assert found["share"] == pytest.approx(1 - 8 / found["parameters"])


def test_explain_takes_a_batch_of_data_and_the_first_output_with_a_gradient(plywise, project):
    out = plywise("explain", "mine:several", "--shape", "8", "--json").out
    assert json.loads(out)["rows"][0]["passes"] == 1
    code, _, err = plywise("explain", "mine:conv", "--data", "digits")
    assert code == 1
    assert "mine:conv failed on a batch of float32 (128, 64)" in err


STEPPED = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, features, labels):
        return "a name", nn.functional.cross_entropy(self.used(features), labels)

def data():
    for _ in range(12):
        yield {"a": torch.randn(5, 4), "b": torch.arange(5) % 3}

def step(model, batch):
    return model(batch["a"], batch["b"])[1]
"""


def test_explain_says_what_it_guessed_about_data_and_takes_the_flag_that_overrules_it(plywise, project):
    rows = [",".join([*(str(n * i % 7) for n in range(8)), str(1 + i % 2)]) for i in range(20)]
    Path("t.csv").write_text("\n".join(rows))
    words = ("explain", "mine:make", "--data", "t.csv")
    _, out, _ = plywise(*words)
    assert "The first line of t.csv holds numbers and was taken as a sample; --read header=yes" in out
    found = json.loads(plywise(*words, "--json").out)
    assert found["guesses"][0] in out
    assert found["summary"][0] in out
    chosen = plywise(*words, "--read", "header=no,targets=classes", "--json")
    assert json.loads(chosen.out)["guesses"] == []
    code, _, err = plywise("explain", "mine:conv", "--data", "t.csv")
    assert code == 1
    assert "--read header=yes takes it as the names" in err, "a model may not fit since a guess is wrong"
    assert "--read is about --data" in plywise("explain", "mine:make", "--read", "header=no").err


def test_explain_takes_a_step_and_its_batches(plywise, project, user_module):
    user_module("stepped", STEPPED)
    words = ["stepped:Model", "--data", "stepped:data", "--step", "stepped:step", "--json"]
    rows = {row["name"]: row for row in json.loads(plywise("explain", *words).out)["rows"]}
    assert (rows["used"]["passes"], rows["unused"]["passes"]) == (1, 0)


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["mine:boom"], r"mine:boom raised ValueError: no weights [bold]today (line 24 of mine.py)."),
        (["mine:leave"], "mine:leave raised SystemExit"),
        (["mine:three"], "returned an object of type int, not a torch.nn.Module"),
        (["mine:wants"], "without arguments (missing a required argument: 'size')"),
        (["mine:number"], "not a function that makes one"),
        (["mine:mak"], "has no 'mak'. Did you mean make?"),
        (["nowhere:make"], "no module 'nowhere'"),
        (["nowhere.inside:make"], "no module 'nowhere'"),
        (["needy:make"], "'needy' needs 'a_package_that_is_not_there', which is not installed"),
        (["broken:make"], "ZeroDivisionError: division by zero (line 3 of broken.py)"),
        (["slip:make"], "SyntaxError"),
        (["mine"], "module:name"),
        (["mine.py:make"], "Write a module, not a file: mine:make."),
        (["mine:make", "--rule", "Prox"], "Did you mean ProxProp"),
        (["mine:make", "--set", "ta=2"], "no hyper-parameter 'ta'. Did you mean tau?"),
        (["mine:make", "--set", "tau"], "name=value"),
        (["mine:make", "--set", "tau=-1"], "above 0, not -1"),
        (["mine:make", "--set", "solver=magic"], "'exact', 'cg', 'cg_flat', 'cg_official', not 'magic'"),
        (["mine:make", "--layers", "encoder.*"], "matches nothing"),
        (["mine:make", "--batch-size", "0"], "at least 1"),
        (["mine:conv", "--shape", "2,7,6"], "mine:conv failed on a batch of float32 (128, 2, 7, 6): "),
        (["mine:conv", "--shape", "2,x"], "--shape is the shape of one sample"),
        (["mine:conv", "--shape", "2,6,6", "--data", "digits"], "give one of them"),
        (["mine:conv", "--step", "mine:step"], "--step takes batches of --data: name them."),
    ],
)
def test_explain_says_what_is_wrong(plywise, project, words, output):
    code, out, err = plywise("explain", *words)
    assert (code, out) == (1, "")
    assert output in err
    assert err.startswith("plywise: ")


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_finds_all_well(plywise):
    code, out, _ = plywise("doctor")
    assert code == 0
    for word in ("torch", "numpy", "blas", "threads", "devices", "All rules train", *RULES):
        assert word in out
    assert out.count("OK") == len(RULES)


def test_doctor_finds_a_rule_that_does_not_train(plywise, monkeypatch):
    from plywise.rules.nlms import NLMS

    def refuse(self, call):
        raise RuntimeError("out of order")

    monkeypatch.setattr(NLMS, "update", refuse)
    code, out, _ = plywise("doctor")
    assert code == 1
    assert "out of order" in out
    assert out.count("OK,") == len(RULES) - 1


# ---- demo ----------------------------------------------------------------------------------------


def test_demo_prints_and_writes(tmp_path, capsys):
    from plywise.arena.demo.preset import DemoConfig

    config = DemoConfig(seeds=2, steps=4, sweep_steps=2, rates=3)
    demo_command.run(config, tmp_path, "plywise demo")
    out = capsys.readouterr().out
    runs = len(config.setups) * (2 + 3) + 2  # and the null control, without a sweep
    assert f"[{runs}/{runs}]" in out
    table = out[out.index("test error, %") :]
    for name in (*config.setups, "adamw-again"):
        assert f"\n {name} " in table
    assert str(tmp_path / "report.html") in table
    assert json.loads((tmp_path / "bench.json").read_text())["unfinished"] == []


def test_demo_refuses_before_it_works(plywise, tmp_path):
    (tmp_path / "taken").write_text("")
    assert plywise("demo", "--out", str(tmp_path / "taken"))[0] == 1
    code, _, err = plywise("demo", "--seeds", "0", "--out", str(tmp_path))
    assert (code, err) == (1, f"plywise: --seeds must be at least 1, not 0.\n{MORE}command-error\n")


@pytest.mark.skipif(os.name == "nt", reason="signals are another matter there")
def test_ctrl_c_keeps_the_finished_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = ForkedCommand(["plywise", "demo", "--out", "here"])
    end = time.monotonic() + DEADLINE
    while "seed 0" not in (tmp_path / "out").read_text():
        alive = time.monotonic() < end and process.poll() is None
        assert alive, (tmp_path / "err").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert "are kept in here/report.html" in err
    assert "Not finished." in (tmp_path / "here" / "report.html").read_text("utf-8")
    assert (tmp_path / "here" / "trials.jsonl").read_text("utf-8")


def test_ctrl_c_before_anything(plywise, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_command, "run", interrupted)
    code, _, err = plywise("demo", "--out", str(tmp_path))
    assert code == 130
    assert "Nothing new was kept" in err
