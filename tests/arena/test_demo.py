"""A tiny demo from end to end, and the parts it is made of."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena.demo.layer_picture import (
    SCALED_BADLY,
    SCALED_WELL,
    backward_sizes,
    bad_scales,
    layer_picture,
    rescale,
)
from plywise.arena.demo.preset import DemoConfig, open_demo
from plywise.arena.demo.setups import SETUPS, Setup
from plywise.arena.reports.bench_page import write_page
from plywise.arena.run.executor import InlineExecutor
from plywise.arena.scoring.records import FINAL, TUNING
from plywise.arena.workloads.networks import mlp
from plywise.data.digits import load_digits
from plywise.errors import PlywiseError
from plywise.registry.find import RULES, find_rule

AT_ONCE = [name for name in RULES if not find_rule(name).remembers]
TINY = DemoConfig(seeds=2, steps=12, sweep_steps=3, rates=3)
TUNED = Path(__file__).parents[2] / "benchmarks" / "tune_demo.json"
make_model = partial(mlp, 64, 12, 12, 12, 10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(TINY, setups=(*SETUPS, Setup("Doomed", 1e9)))
    with open_demo(config, tmp_path_factory.mktemp("demo"), "plywise demo --seeds 2") as bench:
        pieces = list(bench.run(InlineExecutor()))
    return config, bench, pieces


def of(bench, name, purpose):
    lines = [one for one in bench.ledger.lines.values() if (one["method"], one["purpose"]) == (name, purpose)]
    return sorted(lines, key=lambda line: (line["trial"], line["seed"]))


def test_every_setup_is_run_with_every_seed_and_swept_over_rates(finished):
    config, bench, pieces = finished
    assert [piece.done for piece in pieces] == list(range(1, len(pieces) + 1))
    assert len(pieces) == bench.total == len(config.setups) * (2 + 3)
    assert set(RULES) - {"Precondition", "GradientAmplification"} | {"SGD", "AdamW"} <= set(
        bench.about["methods"]
    )
    for setup in config.setups:
        runs, sweep = of(bench, setup.name, FINAL), of(bench, setup.name, TUNING)
        assert [(run["seed"], run["numbers"]["lr"]) for run in runs] == [(0, setup.rate), (1, setup.rate)]
        rates = [run["numbers"]["lr"] for run in sweep]
        assert rates[1] == pytest.approx(setup.rate)
        assert rates[2] / rates[0] == pytest.approx(1e4)
        assert all(run["steps"][-1] <= 3 and len(run["steps"]) <= 2 for run in sweep)


def test_the_control_trains_as_sgd_does_bit_for_bit(finished):
    _, bench, _ = finished
    sgd, control = (of(bench, name, FINAL) for name in ("SGD", "Backprop"))
    assert [run["loss"] for run in sgd] == [run["loss"] for run in control]
    assert bench.about["methods"]["Backprop"]["null"] == "SGD"


def test_failures_are_kept(finished):
    _, bench, _ = finished
    assert all("diverged" in run["failure"] for run in of(bench, "Doomed", FINAL))
    assert any("Doomed 5" in sentence for sentence in bench.summarize().conclusions)


def test_report_is_one_small_file_with_every_method_and_the_picture(finished):
    config, bench, _ = finished
    page, summary = write_page(bench.folder)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 2_000_000
    assert all(setup.name in text for setup in config.setups)
    assert "plywise demo --seeds 2" in text
    assert "Alpaydin" in text, "whose data these are"
    assert SCALED_BADLY in text
    assert f"{len(config.setups)} ways to train one network" in text
    assert not any("edge of its range" in sentence for sentence in summary.conclusions), "nothing was chosen"


def test_an_interrupted_demo_keeps_what_it_has_and_the_next_one_begins_anew(tmp_path):
    config = replace(TINY, setups=SETUPS[:3])
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

    def spread(line):
        return max(line) / min(line)

    assert spread(sizes["Backprop"]) > 10 * spread(sizes["BackMatching"])
    assert spread(sizes["Backprop"]) > 10 * spread(picture["Backprop"][SCALED_WELL])

    def relative(rule, scales):
        torch.manual_seed(0)
        model = make_model()
        rescale(model, scales)
        batch = train.x[:100], train.y[:100]
        return torch.tensor(list(backward_sizes(rule, model, *batch).values()))

    even, odd = [1.0, 1.0, 1.0, 1.0], [10.0, 0.1, 10.0, 0.1]
    ratio = relative(pw.Backprop(), odd) / relative(pw.Backprop(), even)
    torch.testing.assert_close(ratio, torch.tensor([0.01, 1.0, 0.01, 1.0]), rtol=1e-3, atol=0)
    matching = pw.BackMatching()
    torch.testing.assert_close(relative(matching, odd), relative(matching, even), rtol=1e-3, atol=0)


def test_setups_are_the_tuned_ones():
    if not TUNED.exists():
        pytest.skip("not a checkout")
    tuned = {name: m["setup"] for name, m in json.loads(TUNED.read_text(encoding="utf-8"))["methods"].items()}
    ours = {setup.name: setup for setup in SETUPS}
    assert {name: str(ours[name]) for name in tuned} == tuned
    control = replace(ours["SGD"], name="Backprop", rule="Backprop")
    assert ours["Backprop"] == control


def test_setup_says_how_to_write_it():
    setup = Setup("X", 0.5, "ProxProp", {"tau": 0.1}, optimizer_settings={"momentum": 0.9})
    assert str(setup) == "ProxProp(tau=0.1) + SGD(lr=0.5, momentum=0.9)"
    assert str(setup.make_rule()).startswith("ProxProp(tau=0.1")
    optimizer = setup.train(partial(nn.Linear, 1, 1), 2.0).optimizer
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (2.0, 0.9)
