"""A tiny demo from end to end, and the parts it is made of."""

import json
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

import plywise as pw
from plywise.arena.demo.layer_picture import (
    SCALED_BADLY,
    SCALED_WELL,
    backward_sizes,
    bad_scales,
    layer_picture,
    rescale,
)
from plywise.arena.demo.preset import DemoConfig, make_workload, open_demo
from plywise.arena.demo.setups import SETUPS
from plywise.arena.reports.bench_page import write_page
from plywise.arena.run.costs import Cost
from plywise.arena.run.executor import InlineExecutor
from plywise.arena.scoring.records import FINAL, TUNING
from plywise.arena.space import Range
from plywise.arena.workloads.networks import mlp
from plywise.cli.demo import results
from plywise.data.digits import load_digits
from plywise.errors import PlywiseError
from plywise.registry.find import RULES, find_rule

AT_ONCE = [name for name in RULES if not find_rule(name).remembers]
TINY = DemoConfig(seeds=2, steps=12, sweep_steps=3, rates=3)
PAPERS = {"back-matching", "consequentialism", "associated-learning", "proxprop"}
DOOMED = "test_demo:Doomed"
TUNED = Path(__file__).parents[2] / "benchmarks" / "tune_demo.json"
make_model = partial(mlp, 64, 12, 12, 12, 10)


class Doomed(torch.optim.SGD):
    """SGD that accepts any rate."""

    search_space: ClassVar = {"lr": Range(1e-3, 1e12, 1.0)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(TINY, setups={**SETUPS, DOOMED: {"lr": 1e9}})
    with open_demo(config, tmp_path_factory.mktemp("demo"), "plywise demo --seeds 2") as bench:
        pieces = list(bench.run(InlineExecutor()))
    return config, bench, pieces


def find_lines(bench, name, purpose):
    lines = [one for one in bench.ledger.lines.values() if (one["method"], one["purpose"]) == (name, purpose)]
    return sorted(lines, key=lambda line: (line["trial"], line["seed"]))


def test_every_method_is_run_with_every_seed_and_swept_over_rates(finished):
    config, bench, pieces = finished
    assert [piece.done for piece in pieces] == list(range(1, len(pieces) + 1))
    assert len(pieces) == bench.total == len(config.setups) * (2 + 3) + 2
    assert PAPERS | {"sgd", "adamw", "muon", "recommended"} == set(SETUPS)
    for name, numbers in config.setups.items():
        runs, sweep = find_lines(bench, name, FINAL), find_lines(bench, name, TUNING)
        assert [(run["seed"], run["numbers"]) for run in runs] == [(0, numbers), (1, numbers)]
        rates = [run["numbers"]["lr"] for run in sweep]
        assert rates[1] == pytest.approx(numbers["lr"])
        assert rates[2] / rates[0] == pytest.approx(100)
        assert all(run["seed"] not in (0, 1) for run in sweep)
        assert all(run["steps"][-1] <= 3 and len(run["steps"]) <= 2 for run in sweep)


def test_the_null_control_is_adamw_with_other_seeds(finished):
    _, bench, _ = finished
    control, original = (find_lines(bench, name, FINAL) for name in ("adamw-again", "adamw"))
    assert bench.about["methods"]["adamw-again"]["null"] == "adamw"
    assert bench.summarize().results.baselines == ["sgd", "adamw", "muon"]
    assert [run["numbers"] for run in control] == [run["numbers"] for run in original]
    assert not {run["seed"] for run in control} & {run["seed"] for run in original}
    assert not find_lines(bench, "adamw-again", TUNING)


def test_failures_are_kept(finished):
    _, bench, _ = finished
    assert all("diverged" in run["failure"] for run in find_lines(bench, DOOMED, FINAL))
    assert any(f"{DOOMED} 5" in sentence for sentence in bench.summarize().conclusions)


def test_a_time_that_was_never_reached_is_a_dash(finished):
    _, bench, _ = finished
    screen = Console(file=StringIO(), width=200)
    screen.print(results(bench.summarize()))
    (row,) = [line.split() for line in screen.file.getvalue().splitlines() if DOOMED in line]
    assert row[1:6] == ["0", "of", "2", "–", "–"]


def test_time_left_counts_the_short_runs_of_the_sweep(finished, tmp_path):
    """Three runs of 3 steps at other rates, after two of 12."""
    config = replace(TINY, setups={"sgd": SETUPS["sgd"]})
    with open_demo(config, tmp_path) as bench:
        bench.experiment.costs = {("digits-mlp", "sgd"): Cost(step=2.0, rest=0.0)}
        assert bench.experiment.seconds_left(1) == 2 * 12 * 2.0 + 3 * 3 * 2.0


def test_report_is_one_small_file_with_every_method_and_the_picture(finished):
    config, bench, _ = finished
    page, summary = write_page(bench.folder)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 2_000_000
    assert all(name in text for name in config.setups)
    assert "plywise demo --seeds 2" in text
    assert "Alpaydin" in text, "whose data these are"
    assert SCALED_BADLY in text
    assert f"{len(config.setups)} methods train one network" in text
    assert not any("edge of its range" in sentence for sentence in summary.conclusions), "nothing was chosen"


def test_an_interrupted_demo_keeps_its_results_and_the_next_one_starts_over(tmp_path):
    config = replace(TINY, setups=dict(list(SETUPS.items())[:3]))
    with open_demo(config, tmp_path) as bench:
        pieces = bench.run(InlineExecutor())
        for _ in range(2):
            next(pieces)
        pieces.close()
    assert "Not finished." in write_page(tmp_path)[0].read_text(encoding="utf-8")
    assert bench.about["unfinished"]
    with open_demo(config, tmp_path) as again:
        assert again.experiment.done == 0


def test_a_bench_in_the_folder_is_not_overwritten(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps({"title": "plywise bench"}))
    with pytest.raises(PlywiseError, match="holds a bench"), open_demo(TINY, tmp_path):
        pass
    assert json.loads((tmp_path / "bench.json").read_text()) == {"title": "plywise bench"}


def test_rescaling_leaves_the_function_alone():
    torch.manual_seed(0)
    model, x = make_model(), load_digits()[0].x
    before = model(x)
    assert bad_scales(model) == pytest.approx([10.0, 0.1, 10.0, 0.1])
    rescale(model, [10.0, 0.1, 5.0, 0.2])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_picture_shows_what_bad_scales_do():
    """Backprop's relative backward value scales with the square of the factors; BackMatching's does not."""
    train = load_digits()[0]
    picture = layer_picture(make_model, {n: find_rule(n)() for n in AT_ONCE}, train.x, train.y)
    assert list(picture) == AT_ONCE
    assert picture["NLMS"]["names"] == [
        "0 Linear 64→12",
        "2 Linear 12→12",
        "4 Linear 12→12",
        "6 Linear 12→10",
    ]
    sizes = {name: one[SCALED_BADLY] for name, one in picture.items()}
    assert all(line[-1] == 1 for line in (*sizes.values(), picture["Backprop"][SCALED_WELL]))
    assert sizes["ProxProp"] == sizes["NLMS"] == sizes["Backprop"]

    def measure_spread(line):
        return max(line) / min(line)

    assert measure_spread(sizes["Backprop"]) > 10 * measure_spread(sizes["BackMatching"])
    assert measure_spread(sizes["Backprop"]) > 10 * measure_spread(picture["Backprop"][SCALED_WELL])

    def measure_relative_cost(rule, scales):
        torch.manual_seed(0)
        model = make_model()
        rescale(model, scales)
        batch = train.x[:100], train.y[:100]
        return torch.tensor(list(backward_sizes(rule, model, *batch).values()))

    even, odd = [1.0, 1.0, 1.0, 1.0], [10.0, 0.1, 10.0, 0.1]
    ratio = measure_relative_cost(pw.Backprop(), odd) / measure_relative_cost(pw.Backprop(), even)
    torch.testing.assert_close(ratio, torch.tensor([0.01, 1.0, 0.01, 1.0]), rtol=1e-3, atol=0)
    matching = pw.BackMatching()
    torch.testing.assert_close(
        measure_relative_cost(matching, odd), measure_relative_cost(matching, even), rtol=1e-3, atol=0
    )


def test_numbers_are_the_tuned_ones():
    if not TUNED.exists():
        pytest.skip("not a checkout")
    study = json.loads(TUNED.read_text(encoding="utf-8"))
    assert {name: one["numbers"] for name, one in study["methods"].items()} == SETUPS
    assert {len(one["trials"]) for one in study["methods"].values()} == {study["trials_per_method"]}
    workload = make_workload(DemoConfig())
    assert (study["target"], study["steps"]) == (workload.target, workload.steps)
