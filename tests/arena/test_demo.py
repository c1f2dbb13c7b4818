"""A tiny demo from end to end, and the parts it is made of."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena.demo import study as demo
from plywise.arena.demo.conclusions import draw_demo_conclusions
from plywise.arena.demo.layer_picture import WELL_SCALED, backward_sizes, bad_scales, layer_picture, rescale
from plywise.arena.demo.study import SETUPS, DemoConfig, Setup, new_study, perform, save
from plywise.data.digits import load_digits
from plywise.registry.find import RULES, find_rule

AT_ONCE = [name for name in RULES if not find_rule(name).remembers]
TINY = DemoConfig(
    seeds=2, steps=12, sensitivity_steps=3, rates=3, cost_rounds=2, cost_block=1, hidden=(12, 12, 12)
)
TUNED = Path(__file__).parents[2] / "benchmarks" / "tune_demo.json"


@pytest.fixture(scope="module")
def finished():
    plan = replace(TINY, setups=(*SETUPS, Setup("Doomed", 1e9)))
    study = new_study(plan, "plywise demo --seeds 2")
    pieces = list(perform(plan, study))
    study["reading"] = draw_demo_conclusions(study)
    return plan, study, pieces


def test_every_piece_is_told(finished):
    plan, _, pieces = finished
    assert [piece.done for piece in pieces] == list(range(1, plan.pieces + 1))
    assert all(piece.total == plan.pieces and piece.text for piece in pieces)


def test_study_holds_every_method_and_run(finished):
    plan, study, _ = finished
    names = [setup.name for setup in plan.setups]
    assert set(RULES) - {"Precondition", "GradientAmplification"} | {"SGD", "AdamW"} <= set(names)
    assert [method["name"] for method in study["methods"]] == names
    assert [line["name"] for line in study["sensitivity"]] == names
    for method in study["methods"]:
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        assert method["relative_step_cost"] > 0
    for line in study["sensitivity"]:
        assert len(line["rates"]) == len(line["final_loss"]) == 3
        assert line["rates"][1] == pytest.approx(line["default_rate"])
        assert line["rates"][2] / line["rates"][0] == pytest.approx(1e4)
    sgd, backprop = study["methods"][0], study["methods"][2]
    assert [run["loss"] for run in sgd["runs"]] == [run["loss"] for run in backprop["runs"]]


def test_failures_are_kept(finished):
    _, study, _ = finished
    doomed = study["methods"][-1]
    assert all("diverged" in run["failure"] for run in doomed["runs"])
    total = 2 * len(study["methods"])
    assert any(f"2 of {total} runs failed" in sentence for sentence in study["reading"])


def test_report_is_one_small_file_with_every_method(finished, tmp_path):
    plan, study, _ = finished
    page = save(study, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 2_000_000
    assert all(setup.name in text for setup in plan.setups)
    assert "plywise demo --seeds 2" in text
    assert json.loads((tmp_path / "study.json").read_text(encoding="utf-8")) == study
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "study.json"}


def test_an_interrupted_demo_keeps_what_it_has(tmp_path):
    plan = replace(TINY, setups=SETUPS[:3])
    study = new_study(plan, "plywise demo")
    work = perform(plan, study)
    assert draw_demo_conclusions(study) == []
    for wanted in range(9):
        study["reading"] = draw_demo_conclusions(study)
        assert save(study, tmp_path).exists()
        assert sum(len(method["runs"]) for method in study["methods"]) == min(6, max(0, wanted - 1))
        next(work)


def test_rescaling_leaves_the_function_alone():
    torch.manual_seed(0)
    model, x = TINY.make_model(), load_digits()[0].x
    before = model(x)
    assert bad_scales(model) == pytest.approx([10.0, 0.1, 10.0, 0.1])
    rescale(model, [10.0, 0.1, 5.0, 0.2])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_picture_shows_what_bad_scales_do():
    """Backprop's relative backward value scales with the square of the factors; BackMatching's does not."""
    train = load_digits()[0]
    picture = layer_picture(TINY.make_model, {n: find_rule(n)() for n in AT_ONCE}, train.x, train.y)
    sizes = {line["name"]: line["sizes"] for line in picture["series"]}
    assert picture["names"] == ["0 Linear 64→12", "2 Linear 12→12", "4 Linear 12→12", "6 Linear 12→10"]
    assert list(sizes) == [*AT_ONCE, WELL_SCALED]
    assert all(line[-1] == 1 for line in sizes.values())
    assert sizes["ProxProp"] == sizes["NLMS"] == sizes["Backprop"]

    def spread(name):
        return max(sizes[name]) / min(sizes[name])

    assert spread("Backprop") > 10 * spread("BackMatching")

    def relative(rule, scales):
        torch.manual_seed(0)
        model = TINY.make_model()
        rescale(model, scales)
        batch = train.x[:100], train.y[:100]
        return torch.tensor(list(backward_sizes(rule, model, *batch).values()))

    even, odd = [1.0, 1.0, 1.0, 1.0], [10.0, 0.1, 10.0, 0.1]
    ratio = relative(pw.Backprop(), odd) / relative(pw.Backprop(), even)
    torch.testing.assert_close(ratio, torch.tensor([0.01, 1.0, 0.01, 1.0]), rtol=1e-3, atol=0)
    matching = pw.BackMatching()
    torch.testing.assert_close(relative(matching, odd), relative(matching, even), rtol=1e-3, atol=0)


def test_step_costs_of_a_method_that_does_more(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    plan = replace(TINY, hidden=(128, 128), cost_rounds=5, setups=(SETUPS[0], SETUPS[3]))
    plain, prox = demo.step_costs(plan, load_digits()[0])
    assert 0.3 < plain < 3
    assert prox > plain


def test_setups_are_the_tuned_ones():
    if not TUNED.exists():
        pytest.skip("not a checkout")
    tuned = {name: m["setup"] for name, m in json.loads(TUNED.read_text(encoding="utf-8"))["methods"].items()}
    ours = {setup.name: setup for setup in SETUPS}
    assert {name: str(ours[name]) for name in tuned} == tuned
    control = replace(ours["SGD"], name="Backprop", rule="Backprop")
    assert ours["Backprop"] == control


# ---- the reading ---------------------------------------------------------------------------------


def method(name, finals, accuracies=None, cost=1.0, seconds=1.0, steps=(0, 10, 20)):
    runs = [
        {
            "seed": seed,
            "steps": list(steps),
            "loss": [2.0, (2.0 * final) ** 0.5, final],
            "cpu_seconds": [0.0, seconds / 2, seconds],
            "test_accuracy": accuracy,
            "final_loss": final,
            "failure": None,
        }
        for seed, (final, accuracy) in enumerate(zip(finals, accuracies or [0.97] * len(finals), strict=True))
    ]
    return {"name": name, "settings": "", "runs": runs, "relative_step_cost": cost}


def read(*methods, sensitivity=()):
    return " ".join(draw_demo_conclusions({"methods": list(methods), "sensitivity": list(sensitivity)}))


BASE = method("AdamW", [0.1, 0.11, 0.12])


def test_reading_names_the_winner_and_the_losers():
    text = read(BASE, method("Quick", [1e-4] * 3), method("Slow", [0.5] * 3))
    assert "loss of 0.1 (median seed): Quick in 10 steps, 0.50 CPU s. Not, in the median seed: AdamW" in text
    assert "AdamW ended at a training loss of 0.11, first reached after 20 steps and 1.00 CPU s" in text
    assert "Also there: Quick in 10 steps, 0.50 CPU s. Not, in the median seed: Slow." in text
    assert "fewer steps than AdamW to that loss: Quick. By more than a tenth less CPU time: Quick." in text
    assert "Quick all below; Slow all above" in text


def test_reading_says_when_nobody_wins():
    text = read(BASE, method("Same", [0.1, 0.11, 0.13]))
    assert "Same not to be told apart" in text
    assert "to that loss: nobody. By more than a tenth less CPU time: nobody." in text
    assert "No method's test accuracy beats AdamW's by more than the noise" in text
    dear = read(BASE, method("Dear", [1e-4] * 3, seconds=10.0))
    assert (
        "to that loss: Dear. By more than a tenth less CPU time: nobody (slower steps ate the gain)." in dear
    )
    alone = read(BASE, method("Slow", [0.5] * 3))
    assert "Also there: no other method. Not, in the median seed: Slow." in alone


def test_reading_takes_accuracy_beyond_noise_only():
    text = read(BASE, method("Good", [0.1] * 3, [1.0] * 3), method("Bad", [0.1] * 3, [0.8] * 3))
    assert "above AdamW's by more than the noise: Good (+3.0 points)" in text
    assert "below AdamW's by more than the noise: Bad (-17.0 points)" in text


def test_reading_of_a_baseline_that_fails():
    base = method("AdamW", [0.1, 0.1, 0.1])
    for run in base["runs"][1:]:
        run |= {"failure": "diverged", "final_loss": None, "test_accuracy": None, "loss": [2.0, None, None]}
    text = read(base, method("Quick", [0.01] * 3))
    assert "AdamW ended" not in text
    assert "2 of 6 runs failed" in text


def test_reading_counts_rates_and_failures():
    failed = method("Broken", [0.1])
    failed["runs"][0] |= {"failure": "diverged", "final_loss": None, "test_accuracy": None}
    lines = [
        {"name": "Robust", "rates": [1, 2, 3], "final_loss": [0.01, 0.02, 0.03]},
        {"name": "Touchy", "rates": [1, 2, 3], "final_loss": [None, 0.01, 2.0]},
    ]
    text = read(BASE, failed, sensitivity=lines)
    assert "Of 3 rates over four decades" in text
    assert "Robust 3, Touchy 1" in text
    assert "1 of 4 runs failed, and 1 of 6 in the sweep" in text


def test_reading_of_one_seed_claims_nothing_about_noise():
    assert "One seed tells nothing about noise" in read(method("AdamW", [0.1]), method("Quick", [0.01]))


def test_setup_says_how_to_write_it():
    setup = Setup("X", 0.5, "ProxProp", {"tau": 0.1}, optimizer_settings={"momentum": 0.9})
    assert str(setup) == "ProxProp(tau=0.1) + SGD(lr=0.5, momentum=0.9)"
    assert str(setup.make_rule()).startswith("ProxProp(tau=0.1")
    optimizer = setup.train(nn.Linear(1, 1), 2.0).optimizer
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (2.0, 0.9)
