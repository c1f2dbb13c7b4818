"""Weights that are frozen, thawed or put in between two steps: the plan of a step must not be an old one."""

import pytest
import torch
from state_runs import OPTIMIZERS, Run
from torch import Tensor, nn

from plywise import Coordinates, Foof
from plywise.testing.contract.memories import list_layers
from plywise.testing.contract.models import have_same_bits, make_batch, make_mlp

RULES = {
    "gathers often": lambda: Foof(stats_every=2, refresh_every=4),
    "rests": lambda: Foof(stats_every=4, refresh_every=8),
    "turns": lambda: Coordinates(stats_every=4, refresh_every=4),
    "default": Foof,
}
"""Rules whose steps differ: in some all layers rest, in some a few, and in others none."""


def start(rule: str) -> Run:
    return Run(RULES[rule](), OPTIMIZERS["momentum"], model=make_mlp())


def pass_frozen(model: nn.Module, number: int) -> None:
    """Send a gradient through the frozen model, as the step of a GAN's generator does."""
    x = make_batch((6,), 4, seed=80 + number)[0].requires_grad_()
    model.requires_grad_(False)
    model(x).sum().backward()
    model.requires_grad_(True)
    assert x.grad is not None


@pytest.mark.parametrize("rule", RULES)
def test_a_pass_through_frozen_weights_changes_no_step(rule: str) -> None:
    run, other = start(rule), start(rule)
    for number in range(9):
        pass_frozen(other.model, number)
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_is_thawed_after_an_evaluation_trains(rule: str) -> None:
    run, other = start(rule), start(rule)
    for one in (run, other):
        one.model[2].requires_grad_(False)
        one.steps(*range(6))
    with torch.no_grad():
        other.compute_loss(50)
    for one in (run, other):
        one.model[2].requires_grad_(True)
        one.steps(*range(6, 12))
    assert have_same_bits(run.copy_state(), other.copy_state())
    assert "2" in list_layers(run.copy_memory())


@pytest.mark.parametrize("rule", RULES)
def test_layers_that_are_put_in_during_training_are_learned(rule: str) -> None:
    run = start(rule).steps(0, 1)
    torch.manual_seed(3)
    run.model[2] = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 8))
    run.optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.steps(*range(2, 24))
    assert {"2.0", "2.2"} <= list_layers(run.copy_memory())
    assert not run.rule.health.counts


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("freezes", [True, False])
def test_hooks_of_before_attach_come_after_the_whole_step(rule: str, freezes: bool) -> None:
    # such a hook may average the weights or freeze some, and a rule may complete the step after the optimizer
    def begin(is_first: bool) -> tuple[Run, list[Tensor]]:
        run, seen = Run(RULES[rule](), OPTIMIZERS["momentum"], model=make_mlp(), attach=False), []

        def look(*_: object) -> None:
            seen.append(run.model[2].weight.detach().clone())
            if freezes and len(seen) == 4:
                run.model[0].requires_grad_(False)

        if not is_first:
            run.attach()
        run.optimizer.register_step_post_hook(look)
        if is_first:
            run.attach()
        for number in range(8):
            run.step(number)
            assert torch.equal(seen[-1], run.model[2].weight)
        return run, seen

    (run, first), (other, second) = begin(True), begin(False)
    assert all(map(torch.equal, first, second))
    assert have_same_bits(run.copy_state(), other.copy_state())
