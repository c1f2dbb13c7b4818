"""States that come to the wrong place, to the wrong rule or damaged are refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_runs import OPTIMIZERS, RULES, Run
from torch import nn
from torch.optim import SGD, Optimizer

from plywise import NLMS, BackMatching, Backprop, Foof, StateError
from plywise.testing.contract.models import have_same_bits, make_mlp

Parameters = list[nn.Parameter]

REMEMBERING = ["foof", "rls", "coordinates", "gradient_amplification-gradient", "back_matching-mean"]


def make_equal(seed: int = 1) -> nn.Module:
    """Layers of one shape, which nothing but their names tells apart."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def start(rule: str, order: Callable[[Parameters], Any] = list, seed: int = 1) -> Run:
    def make(parameters: Any) -> Optimizer:
        return SGD(order(list(parameters)), lr=0.05, momentum=0.9)

    return Run(RULES[rule](), make, model=make_equal(seed))


def load(run: Run, state: dict[str, Any], loads_first: bool) -> Run:
    """Load a state before the rule is attached or after that."""
    if loads_first:
        run.rule.detach()
    run.optimizer.load_state_dict(state)
    return run.attach() if loads_first else run


def swap_layers(parameters: Parameters) -> Parameters:
    return parameters[2:4] + parameters[:2] + parameters[4:]


def weights_first(parameters: Parameters) -> list[dict[str, Any]]:
    return [{"params": parameters[::2]}, {"params": parameters[1::2]}]


def biases_first(parameters: Parameters) -> list[dict[str, Any]]:
    return weights_first(parameters)[::-1]


@pytest.mark.parametrize("rule", REMEMBERING)
@pytest.mark.parametrize(
    ("saved", "loads"),
    [(list, swap_layers), (weights_first, biases_first), (list, lambda found: found[::-1])],
)
def test_parameters_in_another_order_are_refused(rule: str, saved: Any, loads: Any) -> None:
    run, other = start(rule, saved).steps(0, 1), start(rule, loads, seed=9).steps(2)
    before = other.copy_state()
    with pytest.raises(
        StateError, match=r"in another order: in the place of '\d.\w+' was '\d.\w+'.*by their places"
    ):
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert have_same_bits(other.copy_state(), before)


@pytest.mark.parametrize("rule", REMEMBERING)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_another_order_is_found_at_attach_too(rule: str, optimizer: str) -> None:
    def begin(order: Callable[[Parameters], Any], seed: int) -> Run:
        make = OPTIMIZERS[optimizer]
        return Run(RULES[rule](), lambda p: make(order(list(p))), model=make_equal(seed)).steps(0, 1)

    state = begin(list, 1).optimizer.state_dict()
    other = begin(swap_layers, 9)
    for _ in range(2):  # a second try changes nothing
        with pytest.raises(StateError, match=r"in another order: in the place of '0.weight' was '2.weight'"):
            load(other, copy.deepcopy(state), loads_first=True)


@pytest.mark.parametrize("rule", ["foof", "rls", "coordinates", "back_matching-mean"])
def test_a_model_inside_of_another_one_loads(rule: str) -> None:
    run, other = start(rule).steps(0, 1), start(rule, seed=9)
    other.rule.detach()
    other.model = nn.Sequential(nn.Identity(), other.model)
    other.attach()
    other.model[1].load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for one in (run, other):
        one.steps(2, 3, 4)
    assert have_same_bits(dict(run.model.named_parameters()), dict(other.model[1].named_parameters()))


@pytest.mark.parametrize("rule", REMEMBERING)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_group_that_was_added_before_the_load(rule: str, optimizer: str) -> None:
    def begin(seed: int) -> Run:
        run = Run(RULES[rule](), lambda p: OPTIMIZERS[optimizer](list(p)[:-2]), model=make_equal(seed))
        return run.steps(0, 1)

    def add(run: Run) -> Run:
        run.optimizer.add_param_group({"params": list(run.model.parameters())[-2:]})
        return run

    run, other = add(begin(1)).steps(2, 3), add(begin(9))
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert have_same_bits(run.copy_state(), other.copy_state())
    for number in range(4, 9):
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number


@pytest.mark.filterwarnings("ignore:The optimizer has been used or loaded")  # and has no values
@pytest.mark.parametrize("make", [NLMS, Backprop, BackMatching])
@pytest.mark.parametrize("loads_first", [True, False])
def test_a_rule_without_them_refuses_another_rules_statistics(make: Any, loads_first: bool) -> None:
    run = start("foof").steps(0, 1)
    other = Run(make(), OPTIMIZERS["sgd"], model=make_equal(9))
    state = copy.deepcopy(run.optimizer.state_dict())
    words = "statistics of Foof for 1 parameters .* that no attached Foof handles|no values measured"
    with pytest.raises(StateError, match=words):
        load(other, state, loads_first).step(2)
    other.optimizer.state.clear()  # the way that the message names
    other.step(2)


def test_a_rule_without_statistics_beside_one_that_has_them() -> None:
    def begin(seed: int) -> Run:
        run = Run(NLMS(), OPTIMIZERS["momentum"], model=make_equal(seed), attach=False)
        run.rule.attach(run.model, run.optimizer, layers="0")
        Foof().attach(run.model, run.optimizer, exclude="0")
        return run

    run, other = begin(1).steps(0, 1), begin(9)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert have_same_bits(run.steps(2, 3).copy_state(), other.steps(2, 3).copy_state())


def test_values_of_back_matching_that_were_not_saved_are_refused() -> None:
    plain = Run(NLMS(), OPTIMIZERS["momentum"], model=make_mlp()).steps(0, 1)
    run = Run(BackMatching(), OPTIMIZERS["momentum"], model=make_mlp()).steps(0, 1)
    before = run.copy_state()
    with pytest.raises(StateError, match=r"no values measured by back-matching.*load it before attach"):
        run.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert have_same_bits(run.copy_state(), before)


def change_numbers(state: dict[str, Any], end: str, value: Any) -> None:
    for own in state["state"].values():
        for key in [key for key in own if key.startswith("plywise.") and key.endswith(end)]:
            own[key] = value


@pytest.mark.parametrize("value", [None, "3", 1.5, torch.tensor(3)], ids=repr)
@pytest.mark.parametrize(
    ("rule", "end"),
    [
        *((rule, end) for rule in ("foof", "coordinates") for end in (".step", ".phase", ".in_backward")),
        *(("back_matching-mean", end) for end in (".step", ".missing", ".count")),
    ],
)
@pytest.mark.parametrize("loads_first", [True, False])
def test_numbers_that_are_none_are_refused(rule: str, end: str, value: Any, loads_first: bool) -> None:
    run, other = start(rule).steps(0, 1), start(rule, seed=9)
    state = copy.deepcopy(run.optimizer.state_dict())
    change_numbers(state, end, value)
    with pytest.raises(StateError, match=rf"memory of '0.weight' is damaged: its 'plywise.*{end}' is"):
        load(other, state, loads_first)


@pytest.mark.parametrize("mark", [None, "text", 3, {}, {"rules": None}, {"names": 3}], ids=repr)
def test_a_mark_that_is_none_says_nothing(mark: Any) -> None:
    run, other = start("foof").steps(0, 1), start("foof", seed=9)
    state: dict[str, Any] = copy.deepcopy(run.optimizer.state_dict())
    state["plywise"] = mark
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(state)
    assert have_same_bits(run.steps(2).copy_state(), other.steps(2).copy_state())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_statistics_without_numbers_are_refused(optimizer: str, tmp_path: Path) -> None:
    run, other = (Run(RULES["foof"](), OPTIMIZERS[optimizer], model=make_equal(seed)) for seed in (1, 9))
    torch.save(run.steps(0, 1).optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location="meta")
    with pytest.raises(StateError, match=r"statistics of '0.weight' are on the meta device.*map_location"):
        other.optimizer.load_state_dict(state)
    other.steps(0)
