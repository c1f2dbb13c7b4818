"""Layers that are frozen while a rule with statistics is detached, reset, saved or loaded."""

import copy

import pytest
import torch
from state_runs import OPTIMIZERS, RULES, Run

from plywise import Coordinates, Foof
from plywise.testing.contract.models import are_finite, have_same_bits, make_mlp

STATEFUL = {
    **{name: make for name, make in RULES.items() if make().remembers},
    "foof": Foof,
    "coordinates often": lambda: Coordinates(stats_every=2, refresh_every=2, slowdown=1),
}
PARTS = {"layer": ("weight", "bias"), "weight": ("weight",), "bias": ("bias",)}


def start(rule: str, seed: int = 1) -> Run:
    torch.manual_seed(seed)
    return Run(STATEFUL[rule](), OPTIMIZERS["momentum"], model=make_mlp())


def set_trains(run: Run, part: str, trains: bool) -> None:
    for name in PARTS[part]:
        getattr(run.model[2], name).requires_grad_(trains)


@pytest.mark.parametrize("rule", STATEFUL)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("frozen_steps", [0, 2])
def test_a_run_with_a_frozen_layer_resumes(rule: str, part: str, frozen_steps: int) -> None:
    run = start(rule).steps(*range(7))
    set_trains(run, part, False)
    run.steps(*range(7, 7 + frozen_steps))
    other = start(rule, seed=2)
    set_trains(other, part, False)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for one in (run, other):
        one.steps(20, 21, 22)
        set_trains(one, part, True)
        one.steps(*range(23, 28))
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("leave", ["detach", "reset"])
def test_momenta_of_a_frozen_layer_are_turned_back(part: str, leave: str) -> None:
    # what was frozen in between makes no difference to a layer that has not moved
    run, other = (start("coordinates often").steps(*range(7)) for _ in range(2))
    set_trains(other, part, False)
    for one in (run, other):
        getattr(one.rule, leave)()
    set_trains(other, part, True)
    for one in (run, other):
        one.steps(8, 9, 10)
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize("rule", STATEFUL)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("steps", [7, 10])
def test_what_is_frozen_after_backward_still_takes_that_step(rule: str, part: str, steps: int) -> None:
    # torch's optimizers step what has a gradient; some of these steps gather evidence, others do not
    run, other = (start(rule).steps(*range(steps)) for _ in range(2))
    for one in (run, other):
        one.optimizer.zero_grad()
        one.compute_loss(20).backward()
        if one is run:
            set_trains(one, part, False)
        one.optimizer.step()
        set_trains(one, part, False)
        one.steps(21, 22)
        set_trains(one, part, True)
        one.steps(23, 24)
    assert have_same_bits(run.copy_state(), other.copy_state())


@pytest.mark.parametrize("rule", STATEFUL)
@pytest.mark.parametrize("freezes", [True, False])
def test_a_bias_frozen_or_thawed_between_micro_batches(rule: str, freezes: bool) -> None:
    run = start(rule)
    set_trains(run, "bias", freezes)
    run.steps(*range(10))
    run.optimizer.zero_grad()
    run.compute_loss(20).backward()
    set_trains(run, "bias", not freezes)
    run.compute_loss(21).backward()
    run.optimizer.step()
    weight = run.model[2].weight.detach().clone()
    run.steps(22, 23)
    assert are_finite(run.copy_state())
    assert not torch.equal(run.model[2].weight, weight)
