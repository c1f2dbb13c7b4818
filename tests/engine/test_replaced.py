"""Parameters that are replaced in training: the rule follows them, or says that its optimizer does not."""

import gc
from collections.abc import Callable

import pytest
import torch
from state_runs import OPTIMIZERS, Run
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from plywise import (
    KFAC,
    NLMS,
    AdaBK,
    AttachError,
    BackMatching,
    Backprop,
    Coordinates,
    FeatureWhitening,
    Foof,
    ProxProp,
    Rule,
)
from plywise.testing.contract.models import have_same_bits, make_mlp

STATELESS: list[Callable[[], Rule]] = [Backprop, NLMS, ProxProp]


def start(make: Callable[[], Rule], steps: int = 2) -> Run:
    return Run(make(), OPTIMIZERS["momentum"], model=make_mlp()).steps(*range(steps))


def assign_state(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def convert_anew(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def replace_one(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach() * 0.5)


@pytest.mark.parametrize("replace", [assign_state, convert_anew, replace_one])
@pytest.mark.parametrize("make", [*STATELESS, BackMatching])
def test_an_optimizer_of_the_old_parameters_is_refused(
    make: Callable[[], Rule], replace: Callable[[nn.Module], None]
) -> None:
    # without a word, nothing would be trained
    run = start(make)
    replace(run.model)
    with pytest.raises(AttachError, match=r"layer '[02]' is not the parameter that the rule was attached to"):
        run.step(2)


@pytest.mark.parametrize("replace", [assign_state, convert_anew, replace_one])
@pytest.mark.parametrize("make", [Foof, KFAC, AdaBK, FeatureWhitening, Coordinates])
@pytest.mark.parametrize("steps", [1, 5])  # the next step gathers, or leaves the calls to autograd
def test_statistics_of_the_old_parameters_are_refused(
    make: Callable[[], Rule], replace: Callable[[nn.Module], None], steps: int
) -> None:
    run = start(make, steps)
    replace(run.model)
    with pytest.raises(
        AttachError, match=r"layer '[024]' is not the parameter that the rule was attached to"
    ):
        run.step(steps)


def normalise_weight(model: nn.Module) -> None:
    weight_norm(model[2])


def replace_layer(model: nn.Module) -> None:
    model[2] = nn.Linear(model[2].in_features, model[2].out_features)


@pytest.mark.parametrize("replace", [normalise_weight, replace_layer])
@pytest.mark.parametrize("make", [*STATELESS, BackMatching, Foof, Coordinates])
def test_a_layer_that_the_optimizer_lost_is_refused_until_it_steps_it(
    make: Callable[[], Rule], replace: Callable[[nn.Module], None]
) -> None:
    run = start(make, 1)
    replace(run.model)
    with pytest.raises(AttachError, match=r"The weight of layer '2' is not.*a new layer, a parametrization"):
        run.steps(*range(1, 12))
    run.rule.detach()  # as the message says
    run.optimizer = OPTIMIZERS["momentum"](run.model.parameters())
    run.attach()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.steps(*range(1, 4))
    assert not any(torch.equal(before[name], p) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("make", STATELESS)
@pytest.mark.parametrize("keeps_old", [True, False])
def test_a_parameter_that_the_optimizer_got_too_is_followed(
    make: Callable[[], Rule], keeps_old: bool
) -> None:
    ends = []
    for attaches_again in (False, True):
        run = start(make)
        old = run.model[2].weight
        replace_one(run.model)
        parameters = run.optimizer.param_groups[0]["params"]
        parameters[[p is old for p in parameters].index(True)] = run.model[2].weight
        del run.optimizer.state[old]
        if not keeps_old:
            del old
            gc.collect()
        if attaches_again:
            run.rule.detach()
            run.attach()
        ends.append(run.steps(2, 3, 4).copy_state())
    assert have_same_bits(*ends)


@pytest.mark.parametrize("make", [*STATELESS, BackMatching])
def test_parameters_that_stand_in_for_a_call_are_no_others(make: Callable[[], Rule]) -> None:
    run, other = start(make), start(make)
    for number in range(2, 5):
        values = {name: p.detach().clone().requires_grad_() for name, p in other.model.named_parameters()}
        functional_call(other.model, values, (torch.ones(4, 6),)).sum().backward()
        run.step(number)
        other.step(number)
    assert have_same_bits(run.copy_state(), other.copy_state())


def make_tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [Backprop, lambda: Foof(stats_every=1, refresh_every=1), KFAC])
def test_weights_that_are_tied_no_longer_are_two_layers_or_refused(
    make: Callable[[], Rule], first: bool
) -> None:
    model = make_tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = make().attach(model, optimizer)
    train_step(model, optimizer)
    layer = model[0 if first else 2]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer.add_param_group({"params": [layer.weight]})
    if rule.remembers:
        with pytest.raises(AttachError, match=f"layer '{0 if first else 2}' is not the parameter"):
            train_step(model, optimizer)
        return
    train_step(model, optimizer)
    rule.explain()
    train_step(model, optimizer)
    table = rule.explain()
    assert [(row.name, row.parameters) for row in table.rows] == [("0", 20), ("2", 20), ("4", 10)]
    assert all(row.handled and row.passes for row in table.rows)


def test_an_untied_weight_that_the_optimizer_does_not_step_is_refused() -> None:
    model = make_tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Backprop().attach(model, optimizer)
    train_step(model, optimizer)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(AttachError, match="layer '2' is not the parameter"):
        train_step(model, optimizer)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
