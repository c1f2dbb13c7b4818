"""The statistics in an optimizer's state begin, change and end with it, in every optimizer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from state_runs import OPTIMIZERS, RULES, Run, Stacked, Transposed, Varied
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import LBFGS, Adam, Optimizer

from plywise import RLS, Coordinates, Foof
from plywise.engine.statistics.refresh_cycle import choose_phases
from plywise.optim import SOAP, Muon
from plywise.testing.contract.memories import list_layers, select_layer, select_tensors
from plywise.testing.contract.models import have_same_bits


def resume(run: Run, other: Run) -> Run:
    """``other`` goes on where ``run`` is."""
    other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return other


def new(rule: str = "foof", optimizer: str = "momentum", seed: int = 1) -> Run:
    return Run(RULES[rule](), OPTIMIZERS[optimizer], seed)


# ---- begin and end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clearing_the_state_is_a_new_start(optimizer: str) -> None:
    run = new(optimizer=optimizer).steps(0, 1, 2)
    run.optimizer.state.clear()
    assert not run.copy_memory()
    other = new(optimizer=optimizer)
    other.model.load_state_dict(run.model.state_dict())
    for number in range(3, 8):
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number
    assert int(run.copy_memory()["Foof/step"]) == 5


def test_one_parameters_state_taken_out_is_a_new_start_of_that_layer() -> None:
    run = new().steps(0, 1, 2)
    del run.optimizer.state[run.model.first.weight]
    assert "first" not in list_layers(run.copy_memory())
    run.steps(3, 4, 5)
    assert list_layers(run.copy_memory()) >= {"first", "head"}
    assert have_same_bits(run.copy_state(), resume(run, new(seed=9)).copy_state())


@pytest.mark.filterwarnings("ignore:The optimizer has been used or loaded")  # SGD has no state
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_reset_forgets_the_statistics_alone(optimizer: str) -> None:
    run = new(optimizer=optimizer).steps(0, 1, 2)
    own = [key for state in run.optimizer.state.values() for key in state if not key.startswith("plywise.")]
    run.rule.reset()
    assert not run.copy_memory()
    assert [key for state in run.optimizer.state.values() for key in state] == own
    other = new(optimizer=optimizer)
    other.rule.detach()
    resume(run, other)
    for one in (run, other.attach()):
        one.steps(3, 4, 5, 6)
    assert have_same_bits(run.copy_state(), other.copy_state())


def test_health_is_readable_after_detach() -> None:
    run = new().steps(0)
    run.rule.detach()
    assert not run.rule.health.counts
    assert not any(key.startswith("plywise.") for state in run.optimizer.state.values() for key in state)


def test_a_copied_pair_trains_on() -> None:
    run = new().steps(0, 1, 2)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    other = Run(RULES["foof"](), lambda parameters: optimizer, model=model)
    for number in range(3, 7):
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state())


# ---- resume after every step ---------------------------------------------------------------------------


class Residual(nn.Module):
    """A branch that begins at zero, so that its first gradient is zero."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h + self.scale * self.branch(h))


@pytest.mark.parametrize(("stats", "refresh"), [(4, 4), (1, 4), (2, 2)])
def test_a_first_gradient_of_zero(stats: int, refresh: int) -> None:
    # what measures the size of an update knows it later than the statistics: in the step after
    def make(seed: int) -> Run:
        rule = Foof(stats_every=stats, refresh_every=refresh)
        return Run(rule, OPTIMIZERS["momentum"], model=Residual(seed))

    run, resumed = make(1), []
    for number in range(10):
        run.step(number)
        for other in resumed:
            other.step(number)
            assert have_same_bits(other.copy_state(), run.copy_state()), number
        resumed.append(resume(run, make(9)))


def test_a_layer_that_is_found_later_changes_nobodys_turn() -> None:
    # layers take turns, and a turn once chosen is kept
    run = Run(Foof(stats_every=1, refresh_every=3), OPTIMIZERS["momentum"])
    phases = {}
    for number in range(9):
        if number == 5:
            other = resume(run, Run(Foof(stats_every=1, refresh_every=3), OPTIMIZERS["momentum"], seed=9))
        for one in (run,) if number < 5 else (run, other):
            one.step(number, late=number > 5)
        found = {key: int(value) for key, value in run.copy_memory().items() if key.endswith("/phase")}
        assert {key: found[key] for key in phases} == phases
        phases = found
    assert set(phases.values()) == {0, 1, 2}
    assert {"Foof/late/phase", "Foof/later/phase"} <= phases.keys()
    assert have_same_bits(run.copy_state(), other.copy_state())


def test_turns_are_chosen_so_that_steps_cost_the_same() -> None:
    assert choose_phases({"a": 1.0, "b": 4.0, "c": 2.0, "d": 1.0}, {}, 2) == {"b": 0, "c": 1, "a": 1, "d": 1}
    assert choose_phases({"new": 1.0}, {"old": (0, 3.0), "older": (1, 2.0)}, 3) == {"new": 2}
    assert choose_phases({"new": 1.0}, {"old": (5, 3.0)}, 2) == {"new": 0}  # saved with a longer cycle


def test_parts_of_a_weight_are_named_by_their_rows() -> None:
    runs = [Run(RULES["adabk"](), OPTIMIZERS["momentum"], model=Stacked()) for _ in range(2)]
    for number in range(3):
        runs[0].step(number)
        runs[1].step(number)
    assert {"weight[0:6]", "weight[6:12]"} <= list_layers(runs[0].copy_memory())
    resumed = resume(runs[1], Run(RULES["adabk"](), OPTIMIZERS["momentum"], model=Stacked(9)))
    for number in range(3, 7):
        runs[0].step(number)
        resumed.step(number, turned=True)
        for name in ("weight[0:6]", "weight[6:12]"):
            mine, its = (select_tensors(select_layer(one.copy_memory(), name)) for one in (runs[0], resumed))
            for key, value in mine.items():
                assert torch.allclose(value, its[key], rtol=1e-4, atol=1e-5), (number, key)


# ---- optimizers ----------------------------------------------------------------------------------------


def make_soap(parameters: Any) -> Optimizer:
    return pytest.importorskip("pytorch_optimizer").SOAP(parameters, lr=0.01, precondition_frequency=2)


BEGINNERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "rmsprop": OPTIMIZERS["rmsprop"],
    "soap": make_soap,
    "our soap": lambda parameters: SOAP(parameters, lr=0.01, precondition_frequency=2),
    "our muon": lambda parameters: Muon(parameters, lr=0.01),
}
"""Optimizers that begin a parameter's state where it is empty."""


@pytest.mark.parametrize("make", BEGINNERS.values(), ids=BEGINNERS)
def test_an_optimizer_begins_its_own_state(make: Callable[[Any], Optimizer]) -> None:
    # the first steps have no gradient for some layers, which a template step and a state dict must not begin
    run, plain = Run(RULES["foof"](), make), Run(RULES["foof"](), make, attach=False)
    get_state_dict(run.model, run.optimizer)
    run.optimizer.state.clear()
    for number in range(8):
        for one in (run, plain):
            one.step(number, late=number > 3)
            one.optimizer.state_dict()
        if number == 2:
            other = resume(run, Run(RULES["foof"](), make, seed=9))
        if number > 2:
            other.step(number, late=number > 3)
            assert have_same_bits(run.copy_state(), other.copy_state()), number
    own = [
        [{k for k in s if not k.startswith("plywise.")} for s in o.optimizer.state.values()]
        for o in (run, plain)
    ]
    assert own[0] == own[1]


def test_a_group_that_is_added() -> None:
    def make(parameters: Any) -> Optimizer:
        first, *_ = parameters = list(parameters)
        return torch.optim.SGD([p for p in parameters if p is not first], lr=0.05, momentum=0.9)

    def make_whole(parameters: Any) -> Optimizer:
        parameters = list(parameters)
        optimizer = make(parameters)
        optimizer.add_param_group({"params": parameters[:1], "lr": 0.01})
        return optimizer

    run = Run(RULES["foof"](), make, model=small()).steps(0, 1, 2)
    assert "0" not in list_layers(run.copy_memory())
    run.optimizer.add_param_group({"params": [next(run.model.parameters())], "lr": 0.01})
    run.steps(3, 4)
    other = resume(run, Run(RULES["foof"](), make_whole, model=small(9)))
    for number in range(5, 10):
        run.step(number)
        other.step(number)
        assert have_same_bits(run.copy_state(), other.copy_state()), number
    assert "0" in list_layers(run.copy_memory())


class Clearing(torch.optim.SGD):
    """Has no state of its own, and drops gradients in its step, in which hooks run twice."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.zero_grad()


def test_an_optimizer_that_drops_gradients_in_its_step() -> None:
    # nothing says that the parameter's state may be begun: the statistics wait, and are saved all the same
    run = Run(RULES["foof"](), lambda p: Clearing(p, lr=0.05)).steps(0, 1, 2)
    other = resume(run, Run(RULES["foof"](), lambda p: Clearing(p, lr=0.05), seed=9))
    plain = Run(RULES["foof"](), OPTIMIZERS["sgd"]).steps(0, 1, 2)
    for number in range(3, 7):
        for one in (run, other, plain):
            one.step(number)
        assert have_same_bits(dict(run.model.state_dict()), dict(plain.model.state_dict()))
        assert have_same_bits(dict(other.model.state_dict()), dict(plain.model.state_dict()))
    assert have_same_bits(other.copy_memory(), plain.copy_memory())
    assert not run.rule.health.counts


def small(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), Transposed(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_resumed(search: str | None) -> None:
    # all of its own state is that of the first parameter; one step is one gathering, of the last evaluation
    def make(parameters: Any) -> Optimizer:
        return LBFGS(parameters, lr=0.1, max_iter=3, line_search_fn=search)

    def step(run: Run, number: int) -> None:
        def closure() -> Tensor:
            run.optimizer.zero_grad()
            loss = run.compute_loss(number)
            loss.backward()
            return loss

        run.optimizer.step(closure)

    run = Run(RULES["foof"](), make, model=small())
    step(run, 0)
    step(run, 1)
    assert int(run.copy_memory()["Foof/step"]) == 2
    other = resume(run, Run(RULES["foof"](), make, model=small(9)))
    for number in range(2, 5):
        step(run, number)
        step(other, number)
        assert have_same_bits(run.copy_memory(), other.copy_memory())
        assert have_same_bits(dict(run.model.state_dict()), dict(other.model.state_dict()))


def test_a_statistic_of_a_reserved_name_is_refused() -> None:
    class Stepping(RLS):
        def learn(self, memory: Any, evidence: Any) -> Any:
            return {**super().learn(memory, evidence), "step": evidence["rows"]}

        def learned_shapes(self, shape: Any) -> Any:
            return {**super().learned_shapes(shape), "step": ()}

    run = Run(Stepping(), OPTIMIZERS["momentum"], model=Varied())
    with pytest.raises(ValueError, match="'step' is plywise's own name"):
        run.step(0)


class NormOfChannels(nn.LayerNorm):
    """A norm over channels: whether a call of it will be a known one, only the call shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.weight, self.bias).permute(0, 3, 1, 2)


def make_late(seed: int) -> nn.Module:
    """Convolutions and norms whose plain gradients torch adds up in an order of its own."""
    torch.manual_seed(seed)
    norms = NormOfChannels(4), NormOfChannels(4)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        norms[0],
        nn.Conv2d(4, 4, 3, padding=1),
        norms[1],
        nn.Flatten(),
        nn.Linear(24, 3),
    )


@pytest.mark.parametrize("rule", [Foof, Coordinates, RLS])
@pytest.mark.parametrize("steps", [1, 4])
def test_layers_that_only_calls_show_rest_after_a_resume_as_they_did_before(
    rule: type[Foof | Coordinates | RLS], steps: int
) -> None:
    def begin(seed: int) -> Run:
        run = Run(rule(), OPTIMIZERS["adam"], attach=False, model=make_late(seed))
        run.rule.attach(run.model, run.optimizer, kinds="all")
        return run

    unbroken = begin(1).steps(*range(steps))
    resumed = resume(unbroken, begin(9))
    for number in range(steps, steps + 8):
        unbroken.step(number)
        resumed.step(number)
        assert have_same_bits(unbroken.copy_state(), resumed.copy_state()), number
