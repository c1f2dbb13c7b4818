"""The arena from Python: objects instead of addresses, and results as text, HTML, rows and pictures."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena import bench, diagnose, load
from plywise.arena.given import MODULE, name_data, name_object, shorten_names
from plywise.arena.method import Method, end_to_end
from plywise.arena.run.ledger import read
from plywise.arena.space import Range
from plywise.cli import main
from processes import ForkedCommand

METHODS = ["sgd", "adamw", "proxprop"]


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def make_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    return x, x[:, :3].argmax(1)


class Slow(torch.optim.SGD):
    """SGD under another name."""

    search_space = {"lr": Range(1e-3, 1.0, 0.1)}  # noqa: RUF012


def begin(context):
    optimizer = torch.optim.SGD(context.model.parameters(), lr=context.numbers["lr"])
    return end_to_end(context, optimizer, pw.NLMS())


OWN = Method("own-nlms", "NLMS on plain SGD", {"lr": Range(0.1, 10.0, 1.0)}, begin)


def error(outputs, targets):
    return (outputs.argmax(1) != targets).double().mean()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    methods = [*METHODS, Slow, OWN, pw.Foof]
    return bench(
        make_model,
        make_data(),
        methods=methods,
        trials=5,
        seeds=2,
        steps=60,
        batch_size=32,
        metric=error,
        out=folder,
        progress=False,
    )


def test_objects_are_compared_in_this_process(report):
    names = [*METHODS, "Slow", "own_nlms", "Foof"]
    assert {row.method for row in report.summary.rows} == set(names)
    assert all(line["failure"] is None for line in report.trials)
    assert len(report.trials) == len(names) * (5 + 2 * 2)
    assert {row.track for row in report.summary.rows} == {"tuned", "defaults"}


def test_the_same_call_again_runs_nothing_and_says_the_same(report):
    before = list(read(report.folder / "trials.jsonl"))
    how = {"trials": 5, "seeds": 2, "steps": 60, "batch_size": 32, "metric": error, "progress": False}
    methods = [*METHODS, Slow, OWN, pw.Foof]
    again = bench(make_model, make_data(), methods=methods, out=report.folder, **how)
    assert str(load(report.folder)) == str(again)
    assert list(read(report.folder / "trials.jsonl")) == before
    assert again.conclusions == report.conclusions
    assert str(again) == str(report)


def test_other_methods_in_the_same_folder_are_refused(report):
    with pytest.raises(pw.StateError, match="holds another bench"):
        bench(make_model, make_data(), methods=["sgd"], out=report.folder, progress=False)


def test_it_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    made = []

    def count():
        made.append(1)
        if len(made) == 6:
            raise KeyboardInterrupt
        return make_model()

    how = {"methods": ["sgd", "adamw"], "trials": 1, "seeds": 2, "steps": 5, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        bench(count, make_data(), out=tmp_path, **how)
    kept = [{**line, "workload": "count"} for line in read(tmp_path / "trials.jsonl")]
    assert kept
    assert load(tmp_path).trials == kept
    whole = bench(count, make_data(), out=tmp_path, **how)
    assert whole.trials[: len(kept)] == kept
    assert len(whole.trials) == 10


def test_addresses_run_in_processes_of_their_own(tmp_path, user_module):
    code = """
import os, torch
from torch import nn

def make():
    open(f"pid{os.getpid()}", "w").close()
    return nn.Linear(6, 3)

def data():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)
"""
    user_module("own_things_here", code)
    how = {"methods": ["sgd"], "trials": 0, "seeds": 2, "steps": 5, "workers": 1, "progress": False}
    found = bench("own_things_here:make", "own_things_here:data", out=tmp_path / "runs", **how)
    assert [line["failure"] for line in found.trials] == [None, None]
    assert len(list(tmp_path.glob("pid*"))) == 3  # here, and in each trial's process
    with pytest.raises(pw.PlywiseError, match="Only what can be imported goes to other processes"):
        bench(make_model, make_data(), out=tmp_path / "more", **{**how, "workers": 2})


SCRIPT = """
from pathlib import Path
from torch import nn
from plywise.arena import bench

Path("runs").open("a").write("x")

def make():
    return nn.Linear(100, 1)

ADDRESS = "MODULE:make"
bench(ADDRESS, "quadratic", methods=["sgd"], trials=0, seeds=2, steps=5, out="bench", progress=False)
"""


@pytest.mark.parametrize("module", ["beside", "__main__"])
def test_a_script_needs_no_guard(tmp_path, user_module, module):
    user_module("beside", SCRIPT.partition("ADDRESS")[0])
    (tmp_path / "script.py").write_text(SCRIPT.replace("MODULE", module))
    (tmp_path / "runs").unlink(missing_ok=True)
    assert ForkedCommand(["python", "script.py"]).wait() == 0, (tmp_path / "err").read_text()
    assert [line["failure"] for line in read(tmp_path / "bench" / "trials.jsonl")] == [None, None]
    once = (tmp_path / "runs").read_text()
    assert once == "x" * (1 if module == "__main__" else 4)  # the module: here, and for each trial


def test_a_script_that_imports_itself_gets_instructions(tmp_path, user_module):
    user_module("names_itself", SCRIPT.replace("MODULE", "names_itself"))
    command = ForkedCommand(["python", "names_itself.py"])
    _, err = command.communicate()
    assert command.returncode != 0
    assert "while 'names_itself' is imported" in err
    assert 'below `if __name__ == "__main__":`' in err
    assert not (tmp_path / "bench" / "trials.jsonl").exists()


def test_text_and_html_have_the_ranking_and_the_conclusions(report):
    ranking = report.ranking()
    text, html = str(report), report._repr_html_()
    for one in ranking:
        assert one.method in text
        assert f"<td>{one.method}</td>" in html
    assert MODULE not in text + html
    assert repr(report) == text
    assert all(f"- {sentence}" in text for sentence in report.conclusions)
    assert html.count("<p>") == 1 + len(report.conclusions)
    with pytest.raises(pw.PlywiseError, match="clocks are"):
        report.ranking(clock="sundial")


@pytest.fixture
def print_report(capsys):
    """Run `plywise report` on a folder; its standard output."""

    def run(*words):
        with pytest.raises(SystemExit):
            main(["report", *map(str, words)])
        return capsys.readouterr().out

    return run


def test_no_result_shows_the_module_of_given_objects(report, print_report):
    shown = [report.rows(what) for what in ("methods", "ranking", "trials")]
    printed = print_report(report.folder, "--json")
    assert MODULE not in f"{shown}{printed}{(report.folder / 'report.html').read_text()}"
    assert MODULE in (report.folder / "bench.json").read_text(), "which is resumed by it"


def test_a_method_that_is_called_as_one_of_ours_keeps_its_address():
    bench, lines = {"methods": ["muon", f"{MODULE}:muon"]}, [{"method": f"{MODULE}:muon"}]
    assert shorten_names(bench, lines) == (bench, lines)


def test_a_bench_without_tuning_has_no_target_and_shows_where_its_methods_ended(tmp_path, print_report):
    given = {"methods": ["sgd", "adamw"], "trials": 0, "seeds": 1, "steps": 2}
    found = pw.arena.bench(make_model, make_data(), **given, out=tmp_path / "bench", progress=False)
    printed = print_report(found.folder)
    for row in found.summary.rows:
        for text in (str(found), printed):
            assert f"{row.validation.median:.4g}" in text
    assert "No target, since no baseline was tuned" in printed
    assert " rank" not in printed.partition("There is no")[0]


def test_a_bench_that_ranks_nobody_shows_where_its_methods_ended(tmp_path, print_report):
    def model():
        return nn.Linear(3, 2)

    def spoiled(outputs, targets):
        return (outputs.argmax(1) != targets).float().mean() + 5  # worse than knowing nothing

    x, y = torch.randn(60, 3), torch.arange(60) % 2
    given = {"methods": ["sgd", "adamw"], "trials": 1, "seeds": 1, "steps": 2, "metric": spoiled}
    found = pw.arena.bench(model, (x, y), **given, out=tmp_path / "bench", progress=False)
    assert found.summary.results.ranked == []
    ends = [row.validation.median for row in found.summary.rows if row.track == "tuned"]
    for end in ends:
        assert f"{end:.4g}" in str(found)
        assert f"<td>{end:.4g}</td>" in found._repr_html_()
        assert f"{end:.4g}" in print_report(found.folder)
    assert len(json.loads(print_report(found.folder, "--json"))["methods"]) == 4


@pytest.mark.parametrize(("what", "count"), [("methods", 12), ("ranking", 6), ("trials", 54)])
def test_rows_are_flat(report, what, count):
    rows = report.rows(what)
    assert len(rows) == count
    assert not any(isinstance(value, dict | tuple) for row in rows for value in row.values())
    assert "method" in rows[0]
    with pytest.raises(pw.PlywiseError, match="Rows are"):
        report.rows("columns")


def test_a_dataframe_or_the_name_of_the_package(report, monkeypatch):
    try:
        import pandas
    except ImportError:
        with pytest.raises(pw.PlywiseError, match="pip install pandas"):
            report.to_dataframe()
    else:
        frame = report.to_dataframe("trials")
        assert isinstance(frame, pandas.DataFrame)
        assert len(frame) == len(report.trials)


@pytest.mark.parametrize("what", ["curves", "ranking", "rates", "pareto"])
def test_pictures(report, what, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.plot(what)
    (axis,) = figure.axes
    drawn = [*axis.lines, *axis.collections]
    assert len(drawn) >= len(METHODS)
    assert axis.get_xlabel()
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_the_curves_are_those_of_the_trials(report):
    pytest.importorskip("matplotlib")
    (axis,) = report.plot("curves").axes
    assert axis.get_ylabel() == "error, validation"
    lines = {line.get_label(): line for line in axis.lines}
    which = ("final", "tuned", "sgd")
    finals = [line for line in report.trials if (line["purpose"], line["track"], line["method"]) == which]
    last = sorted(line["validation"][-1] for line in finals)
    assert lines["sgd"].get_ydata()[-1] == pytest.approx(sum(last) / 2, rel=1e-2)


def test_the_legend_of_costs_and_ends_names_each_method(report):
    pytest.importorskip("matplotlib")
    (axis,) = report.plot("pareto").axes
    shown = [text.get_text() for text in axis.get_legend().get_texts()]
    names = report.summary.results.methods
    assert sorted(text.removesuffix(" (dominated)") for text in shown) == sorted(names)
    assert not all("dominated" in text for text in shown)


def test_an_unknown_picture(report):
    with pytest.raises(pw.PlywiseError, match="Pictures are"):
        report.plot("pie")


def test_the_page_is_drawn_from_the_same_folder(report):
    page = report.write_page()
    assert page == report.folder / "report.html"
    assert "own_nlms" in page.read_text("utf-8")


def test_diagnose(tmp_path):
    seen = diagnose(make_model, make_data(), batches=2)
    assert [layer.name for layer in seen.diagnosis.layers] == ["0", "2"]
    assert seen.advice
    assert all(one.title in str(seen) for one in seen.advice)
    assert seen._repr_html_().count("<tr>") == 3
    assert [row["name"] for row in seen.rows()] == ["0", "2"]
    pytest.importorskip("matplotlib")
    seen.plot().savefig(tmp_path / "layers.png")
    shipped = diagnose(workload="digits-mlp", batches=1)
    assert len(shipped.diagnosis.layers) == 4


def test_what_was_guessed_about_data_is_in_the_results(tmp_path):
    def stream():
        while True:
            yield torch.arange(30).view(5, 6), torch.arange(5) % 3

    def model():
        return nn.Sequential(nn.Embedding(30, 2), nn.Flatten(), nn.Linear(12, 3))

    how = {"methods": "sgd", "trials": 0, "seeds": 1, "steps": 2, "progress": False}
    guesses = (
        "The inputs are whole numbers and were left so, as tokens for embeddings; --read inputs=numbers",
        "stream, train: the first 12 batches of a longer stream were kept; --keep-batches says how many.",
    )
    report = bench(model, stream, keep_batches=12, out=tmp_path, **how)
    shown = [str(report), report._repr_html_(), str(load(tmp_path)), report.write_page().read_text("utf-8")]
    seen = diagnose(model, stream, keep_batches=12, batches=1)
    for text in (*shown, str(seen), seen._repr_html_()):
        assert all(guess in text for guess in guesses)
        assert MODULE not in text


def test_missing_parts_are_named(tmp_path):
    for call in (
        lambda: bench(out=tmp_path),
        lambda: bench(make_model, out=tmp_path),
        lambda: bench(make_model, make_data(), workloads="quick", out=tmp_path),
        lambda: diagnose(make_model),
        lambda: diagnose(),
    ):
        with pytest.raises(pw.PlywiseError, match="Give a model with data"):
            call()
    with pytest.raises(pw.PlywiseError, match="Did you mean digits-mlp"):
        bench(workloads="digits-mpl", out=tmp_path)
    with pytest.raises(pw.PlywiseError, match="is not a bench"):
        load(tmp_path)
    network = make_model()
    with pytest.raises(pw.PlywiseError, match="returned the same network twice"):
        bench(lambda: network, make_data(), out=tmp_path, progress=False)


def test_errors_and_progress_name_objects_as_the_user_does(tmp_path, capsys):
    for call, output in (
        (lambda: bench(make_model(), make_data(), out=tmp_path), "^model is a network"),
        (lambda: diagnose(make_model(), make_data()), "^model is a network"),
        (lambda: bench(make_model, make_data()[0], out=tmp_path), "^data returned a Tensor"),
    ):
        with pytest.raises(pw.PlywiseError, match=output):
            call()
    for thing, kind in ((pw.Foof(), "Foof"), (nn.Linear, "the class Linear")):
        with pytest.raises(pw.PlywiseError, match=f"the class, not an object made from it.*, not {kind} "):
            bench(make_model, make_data(), methods=["sgd", thing], out=tmp_path)
    bench(make_model, make_data(), methods="sgd, adamw", trials=0, seeds=1, steps=2, out=tmp_path / "two")
    printed = capsys.readouterr().out
    assert "make_model: adamw" in printed
    assert MODULE not in printed


@pytest.mark.parametrize("methods", [None, torch.optim.SGD, OWN])
def test_methods_that_are_no_list(methods, tmp_path):
    with pytest.raises(pw.PlywiseError, match=r"methods must be a list of names, classes and .*, not "):
        bench(make_model, make_data(), methods=methods, out=tmp_path)


@pytest.mark.parametrize("numbers", [{"trials": "8"}, {"trials": -1}, {"seeds": 0}, {"seeds": 1.5}])
def test_numbers_of_runs_are_whole(numbers, tmp_path):
    with pytest.raises(pw.PlywiseError, match=r"(trials|seeds) must be a whole number of at least [01]"):
        bench(make_model, make_data(), out=tmp_path, **numbers)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ({"steps": 20.5}, "steps must be a whole number of at least 1, not 20.5"),
        ({"steps": True}, "steps must be a whole number of at least 1, not True"),
        ({"batch_size": "32"}, "batch_size must be a whole number of at least 1, not '32'"),
    ],
)
def test_the_lengths_of_a_run_are_whole(number, says, tmp_path):
    with pytest.raises(pw.PlywiseError, match=says):
        bench(make_model, make_data(), methods="sgd", out=tmp_path, **number)


def test_a_device_of_torch(tmp_path):
    settings = {"methods": "sgd", "trials": 0, "seeds": 1, "steps": 2, "out": tmp_path, "progress": False}
    assert bench(make_model, make_data(), device=torch.device("cpu"), **settings).trials


def test_names_of_objects():
    assert name_object("a:b", "model") == "a:b"
    assert name_object(make_model, "model") == f"{MODULE}:make_model"
    assert name_object(lambda: 1, "model") == f"{MODULE}:model"
    assert sys.modules[MODULE].make_model is make_model
    pair = make_data()
    address = name_data(pair)
    assert getattr(sys.modules[MODULE], address.partition(":")[2])() is pair


def test_a_bench_in_progress_is_shown(tmp_path, capsys):
    how = {"methods": ["sgd"], "trials": 0, "seeds": 2, "steps": 5}
    bench(make_model, make_data(), out=tmp_path, **how)
    out = capsys.readouterr().out
    assert "[1/2] " in out
    assert "[2/2] " in out
    assert "left" in out
    about = json.loads((tmp_path / "bench.json").read_text())
    assert about["unfinished"] == []
    assert math.isfinite(load(tmp_path).trials[0]["validation"][-1])


def test_a_loader_and_a_step_function(tmp_path):
    x, y = make_data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)

    def step(model, batch):
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets)

    how = {"methods": ["sgd"], "trials": 0, "seeds": 1, "steps": 5, "progress": False}
    found = bench(make_model, loader, step=step, out=tmp_path, **how)
    assert [line["failure"] for line in found.trials] == [None]
    assert found.trials[0]["validation"][-1] < found.trials[0]["validation"][0]


def test_completion_finds_the_functions_before_they_are_used():
    code = "import plywise.arena as arena; print({'bench', 'diagnose', 'load'} <= set(dir(arena)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
