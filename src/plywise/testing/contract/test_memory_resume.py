"""The memory travels in the optimizer's state: bit for bit, and never into another model or rule."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plywise import NLMS, RLS, FeatureWhitening, Foof, StateError, StatefulRule
from plywise.testing.cases import Case
from plywise.testing.contract.memories import Run, copy_saved_memory, select_layer, select_tensors, start
from plywise.testing.contract.models import (
    are_finite,
    assert_close,
    copy_weights,
    count_fallbacks,
    have_same_bits,
    make_mlp,
    save_and_load,
)

STEPS = 8
State = dict[str, Any]


ROADS: dict[str, Callable[[State], State]] = {"file": save_and_load, "deepcopy": copy.deepcopy}


def copy_saved_in(run: Run, state: State) -> dict[str, Tensor]:
    """Copy the statistics in a state dict of a run's optimizer."""
    return copy_saved_memory(run.model, run.optimizer, state)


@pytest.mark.parametrize(
    ("kind", "road", "dtype"),
    [
        ("mlp", "file", torch.float32),
        pytest.param("mlp", "deepcopy", torch.float64, marks=pytest.mark.one_of_family),
        ("mixed", "file", torch.float32),
        pytest.param("mixed", "file", torch.bfloat16, marks=pytest.mark.one_of_family),
    ],
    ids=str,
)
def test_broken_off_and_resumed_after_every_step(
    memory_case: Case, kind: str, road: str, dtype: torch.dtype
) -> None:
    run = start(memory_case, kind, dtype=dtype)
    unbroken = run.record(range(STEPS))

    run = start(memory_case, kind, dtype=dtype)
    for number, expected in enumerate(unbroken):
        run.step(number)
        assert have_same_bits(run.copy_state(), expected), number
        state = ROADS[road](run.read_state())
        run.rule.detach()
        # another start, and now and then a rule that remembers something else
        run = start(memory_case, kind, 100 + number, dtype, steps=number % 3).load(state)
        assert have_same_bits(run.copy_state(), expected), number


def test_one_state_starts_several_runs(memory_case: Case) -> None:
    state, ends = copy.deepcopy(start(memory_case, steps=3).read_state()), []
    saved = copy.deepcopy(state)
    for _ in range(2):
        mine = copy.deepcopy(state)  # torch trains on with the very momenta that it loaded
        for index, own in state["optimizer"]["state"].items():  # but on no tensor of ours
            ours = {key: value for key, value in own.items() if str(key).startswith("plywise.")}
            mine["optimizer"]["state"][index].update(ours)
        run = start(memory_case, seed=9).load(mine)
        ends.append(run.record(range(3, 6))[-1])
    assert have_same_bits(*ends)
    assert have_same_bits(copy_saved_in(run, state["optimizer"]), copy_saved_in(run, saved["optimizer"]))


def test_training_on_does_not_change_what_was_saved(memory_case: Case) -> None:
    run = start(memory_case, steps=3)
    state = run.optimizer.state_dict()
    kept = copy_saved_in(run, state)
    for number in range(3, 7):
        run.step(number)
        assert have_same_bits(copy_saved_in(run, state), kept)
    run.model.double()
    run.step(7)
    assert have_same_bits(copy_saved_in(run, state), kept)
    assert not have_same_bits(run.copy_memory(), kept)


def test_gradients_of_before_the_load_do_not_count(memory_case: Case) -> None:
    ends = []
    for disturbed in (False, True):
        run = start(memory_case, steps=3)
        state = copy.deepcopy(run.read_state())
        if disturbed:
            run.step(20)
            run.optimizer.zero_grad()
            run.backward(21)
        run.load(state)
        run.step(3)
        ends.append(run.copy_state())
    assert have_same_bits(*ends)


@pytest.mark.parametrize(
    ("dtype", "kept", "tolerance"),
    [(torch.float64, torch.float64, 1e-3), (torch.bfloat16, torch.float32, 0.1)],
)
def test_loading_into_a_model_of_another_dtype(
    memory_case: Case, dtype: torch.dtype, kept: torch.dtype, tolerance: float
) -> None:
    run = start(memory_case, steps=4)
    state = copy.deepcopy(run.read_state())
    other = start(memory_case, seed=9)
    other.model.to(dtype)
    other.load(state)
    assert have_same_bits(other.copy_memory(), copy_saved_in(run, state["optimizer"]))
    for number in range(4, 8):
        run.step(number)
        other.step(number)
    assert {value.dtype for value in select_tensors(other.copy_memory()).values()} == {kept}
    assert count_fallbacks(other.rule) == 0
    loaded = {name: value.to(torch.float32) for name, value in copy_weights(other.model).items()}
    assert_close(loaded, copy_weights(run.model), tolerance)


def test_frozen_between_load_and_step(memory_case: Case) -> None:
    run = start(memory_case, seed=9).load(copy.deepcopy(start(memory_case, steps=4).read_state()))
    run.model[2].bias.requires_grad_(False)
    assert all(map(are_finite, run.record(range(4, 7))))
    assert not run.rule.health.counts


# ---- what is refused --------------------------------------------------------------------------------


def make_wide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))


def make_longer() -> nn.Module:
    return nn.Sequential(*make_mlp(), nn.ReLU(), nn.Linear(3, 3))


def make_shorter() -> nn.Module:
    return make_mlp()[:3]


def make_without_bias() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "wider": (make_wide, r"layer '[24]' does not fit this model.*another architecture"),
    "longer": (make_longer, "doesn't match the size of optimizer's group"),  # torch's own words
    "shorter": (make_shorter, "doesn't match the size of optimizer's group"),
    "without a bias": (make_without_bias, "of Foof for 1 parameters"),
}


def assert_refused(run: Run, state: State, words: str) -> None:
    """Assert that loading fails with these words, and changes nothing."""
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises((StateError, ValueError), match=words):
        run.optimizer.load_state_dict(state)
    after = run.optimizer.state_dict()
    assert have_same_bits(copy_saved_in(run, after), copy_saved_in(run, before))
    assert after["param_groups"] == before["param_groups"]
    for number, state_of_one in before["state"].items():
        assert have_same_bits(
            {key: value for key, value in after["state"][number].items() if isinstance(value, Tensor)},
            {key: value for key, value in state_of_one.items() if isinstance(value, Tensor)},
        )


@pytest.mark.parametrize("what", list(OTHERS))
def test_another_architecture(memory_case: Case, what: str) -> None:
    if what == "wider" and not memory_case.remembers_rows:
        pytest.skip("what it remembers is alike for layers of all sizes")
    make, words = OTHERS[what]
    other = make()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    rule = memory_case.make().attach(other, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        other(torch.ones(4, 6)).square().sum().backward()
        optimizer.step()
    run = start(memory_case, steps=2)
    assert_refused(run, optimizer.state_dict(), words.replace("Foof", type(rule).__name__))
    rule.detach()


def test_another_rule(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    mine = type(run.rule).__name__
    make: type[StatefulRule] = FeatureWhitening if mine != "FeatureWhitening" else RLS
    case = Case("other", make)
    words = f"saved with {make.__name__}, and the rule attached is {mine}"
    assert_refused(run, copy.deepcopy(start(case, steps=2).optimizer.state_dict()), words)
    assert_refused(start(case), run.optimizer.state_dict(), f"saved with {mine}")


def test_no_memory(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    name = type(run.rule).__name__
    for make in (lambda: NLMS(), lambda: None):
        model, rule = make_mlp(), make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if rule is not None:
            rule.attach(model, optimizer)
        assert_refused(run, optimizer.state_dict(), f"holds no memory of {name}.*load it before attach")
    # the way that the message names
    run.rule.detach()
    state = run.optimizer.state_dict()
    assert "plywise" not in state
    run.optimizer.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match=f"no statistics of {name}: they begin from nothing"):
        run.rule.attach(run.model, run.optimizer)
    run.step(2)
    assert are_finite(run.copy_state())


def test_states_of_before_the_first_step(memory_case: Case) -> None:
    run = start(memory_case)
    state = copy.deepcopy(run.read_state())
    other = start(memory_case, seed=9, steps=3)
    other.load(state)
    assert have_same_bits(run.record(range(4))[-1], other.record(range(4))[-1])


# ---- several rules ----------------------------------------------------------------------------------


def pair(case: Case, second: Callable[[], StatefulRule], turned: bool = False) -> Run:
    run = start(case)
    run.rule.detach()
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=0.01)
    attachings = [
        lambda: run.rule.attach(run.model, run.optimizer, layers="0"),
        lambda: second().attach(run.model, run.optimizer, exclude="0"),
    ]
    for attaching in reversed(attachings) if turned else attachings:
        attaching()
    return run


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_two_rules_on_one_optimizer(memory_case: Case, same: bool, turned: bool) -> None:
    second = memory_case.make if same else (lambda: Foof(stats_every=1, refresh_every=2))
    run = pair(memory_case, second)
    run.record(range(3))
    state = save_and_load(run.read_state())
    assert len(state["optimizer"]["plywise"]["rules"]) == 2
    other = pair(memory_case, second, turned).load(state)
    for number in range(3, 6):
        run.step(number)
        other.step(number)
    assert have_same_bits(copy_weights(other.model), copy_weights(run.model))
    for layer in "024":
        mine, its = (select_layer(one.copy_memory(), layer) for one in (run, other))
        assert mine
        assert have_same_bits(mine, its)
    run.rule.detach()
    assert len(run.optimizer.state_dict()["plywise"]["rules"]) == 1
    left = run.copy_memory()
    assert not select_layer(left, "0")
    assert select_layer(left, "2")
    assert select_layer(left, "4")
