"""Compiled models: where calls are captured nothing is compiled, at rest all of it is, and numbers stay."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from plywise import BackMatching, Coordinates, Foof, ProxProp, Rule
from plywise.testing.contract.models import copy_weights, have_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

REST = {"stats_every": 10, "refresh_every": 10}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # after each compilation torch flushes the cache, to time the guards once for its own log
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Linear layers, and what is compiled between them by itself."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.gain = nn.Parameter(torch.rand(12))
        self.between = between or scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(torch.tanh(self.first(x)), self.gain)
        return self.last(F.gelu(self.second(h)) + h)


def scale(x: Tensor, gain: Tensor) -> Tensor:
    return x * gain


def mix(x: Tensor, gain: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def train(
    rule: Rule,
    model: nn.Module,
    call: Callable[[Tensor], Tensor] | None = None,
    steps: int = 13,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights after some steps; statistics are gathered in the first one and in the eleventh."""
    call = model if call is None else call
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rule.attach(model, optimizer, **options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        call(torch.randn(40, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return copy_weights(model)


RULES: dict[str, Callable[[], Rule]] = {
    "proxprop": ProxProp,
    "foof": lambda: Foof(**REST),
    "coordinates": lambda: Coordinates(**REST),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("part", ["whole", "first and second"])
def test_compiled_models_train_as_others(rule: str, part: str) -> None:
    expected = train(RULES[rule](), Net(), kinds="all")
    model, call = Net(), None
    if part == "whole":
        call = torch.compile(model, backend="aot_eager")
    else:
        model.first.compile(backend="aot_eager")
        model.second = torch.compile(model.second, backend="aot_eager")
    found = train(RULES[rule](), model, call, kinds="all")
    assert have_same_bits({key.replace("_orig_mod.", ""): value for key, value in found.items()}, expected)


@pytest.mark.parametrize("rule", ["foof", "coordinates"])
def test_at_rest_the_whole_model_is_one_graph(rule: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Net()
    train(RULES[rule](), model, torch.compile(model, backend=counter), kinds="all")
    plain = CompileCounterWithBackend("aot_eager")
    torch.compile(Net(), backend=plain)(torch.randn(40, 6))
    assert counter.frame_count == plain.frame_count == 1
    assert counter.op_count == plain.op_count
    assert sum(counters["graph_break"].values()) <= 2  # at the model's entry, seen in two kinds of steps


def test_where_calls_are_captured_nothing_is_compiled_again_and_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Net()
    train(ProxProp(), model, torch.compile(model, backend=counter))
    assert counter.frame_count == 0
    assert sum(counters["graph_break"].values()) <= 2  # at the model's entry, and not at each call


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("between", "whole"), [(mix, True), (mix, False), (scale, False)], ids=["mix whole", "mix", "scale"]
)
def test_compiled_functions_inside_of_a_model(rule: str, between: Any, whole: bool) -> None:
    expected = train(RULES[rule](), Net(between), kinds="all")
    inner = torch.compile(between, backend="aot_eager", fullgraph=whole)
    assert have_same_bits(train(RULES[rule](), Net(inner), kinds="all"), expected)


def test_a_graph_that_must_not_end_is_refused_with_the_reason() -> None:
    inner = torch.compile(scale, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"plywise reads calls.*leave fullgraph=True out"):
        train(ProxProp(), Net(inner), kinds="all")
    model = Net()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"plywise reads calls.*leave fullgraph=True out"):
        train(ProxProp(), model, torch.compile(model, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("rule", [*RULES, "back matching"])
@pytest.mark.parametrize("part", ["step", "step and backward"])
def test_a_compiled_step_is_no_compiled_rule(rule: str, part: str) -> None:
    make = BackMatching if rule == "back matching" else RULES[rule]
    expected, _ = run_steps(make(), part, compiles=False)
    found, graphs = run_steps(make(), part)
    assert have_same_bits(found, expected)
    # of the loss and the step, before and after the state is there
    assert graphs <= count_graphs_without_a_rule(part) + 5


@cache
def count_graphs_without_a_rule(part: str) -> int:
    return run_steps(None, part)[1]


def run_steps(rule: Rule | None, part: str, compiles: bool = True) -> tuple[dict[str, Tensor], int]:
    """The weights after some steps, and the number of compiled graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager") if compiles else None
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if rule is not None:
        rule.attach(model, optimizer)
    act = compile_steps(model, optimizer, part, counter)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        optimizer.zero_grad()
        act(torch.randn(40, 6, generator=generator))
    return copy_weights(model), 0 if counter is None else counter.frame_count


def compile_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: str, backend: Any
) -> Callable[[Tensor], None]:
    def step() -> None:
        optimizer.step()

    def act(x: Tensor) -> None:
        model(x).square().mean().backward()
        step()

    if backend is not None and part == "step":
        step = torch.compile(step, backend=backend)
    return torch.compile(act, backend=backend) if backend is not None and part != "step" else act


def test_a_compiled_step_that_must_not_end_is_refused_with_the_reason() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ProxProp().attach(model, optimizer)
    model(torch.ones(4, 6)).sum().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"a rule of plywise acts.*leave fullgraph=True"):
        torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)()


def test_a_state_loaded_in_a_step_at_rest_counts_at_once() -> None:
    ends = []
    for compiles in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        Foof(**REST).attach(model, optimizer)
        call = torch.compile(model, backend="aot_eager") if compiles else model
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
        for step in range(6):
            optimizer.zero_grad()
            if step == 1:
                begun = copy.deepcopy(optimizer.state_dict())
            if step == 4:
                call(x)  # all layers are found at rest
                optimizer.load_state_dict(begun)
            call(x).square().mean().backward()
            optimizer.step()
        ends.append(copy_weights(model))
    assert have_same_bits(*ends)
