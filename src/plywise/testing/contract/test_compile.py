"""torch.compile before attaching is fine; after the first compiled call it is noticed."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from plywise import Rule, UncapturedLayerError
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    assert_close,
    compute_gradients,
    compute_loss,
    copy_gradients,
    make_batch,
    make_mlp,
)

pytestmark = [
    # test_compiled_then_attached shows that compiling with a rule says nothing
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # torch's own look at the tensors between two compiled graphs; hidden unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # after each compilation torch flushes the cache, to time the guards once for its own log
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
    yield
    torch._dynamo.reset()


def make_small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)


@pytest.mark.one_of_family
@pytest.mark.parametrize(("backend", "attach_to"), [("eager", "model"), ("aot_eager", "compiled")])
def test_compiled_then_attached(case: Case, rule: Rule, backend: str, attach_to: str) -> None:
    data = make_batch(dtype=torch.float64)
    eager = make_small()
    other = attach(case.make(), eager, torch.optim.SGD(eager.parameters(), lr=0.1), warm=(6,))
    expected = compute_gradients(eager, data)
    other.detach()
    model = make_small()
    compiled = torch.compile(model, backend=backend)
    target = model if attach_to == "model" else compiled
    attach(rule, target, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    torch._dynamo.utils.warn_once_cache.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always" if backend == "eager" else "ignore")
        compute_loss(compiled, data).backward()
    assert [str(warning.message) for warning in caught] == []
    assert_close(copy_gradients(model), expected)
    assert [(row.name, row.handled) for row in rule.explain().rows] == [("0", True), ("2", True)]


@pytest.mark.one_of_family
def test_attached_after_the_first_compiled_call_is_an_error(rule: Rule) -> None:
    model, data = make_small(), make_batch(dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    compute_loss(compiled, data).backward()
    attach(rule, model)
    with pytest.raises(
        UncapturedLayerError, match=r"weight '2\.weight'.*torch\.compile ran.*before attach.*exclude='2'"
    ):
        compute_loss(compiled, data).backward()
    torch._dynamo.reset()  # the cure that the message names
    model.zero_grad()
    compute_loss(compiled, data).backward()
    assert len(copy_gradients(model)) == 4


@pytest.mark.parametrize(
    "road", ["forward before attach", "forward called directly", "weight used outside its layer"]
)
def test_other_roads_past_the_rule_are_errors(rule: Rule, road: str) -> None:
    model, (x, _) = make_mlp(), make_batch()
    if road == "forward before attach":
        out = model(x)
        attach(rule, model)
    else:
        attach(rule, model)
        h = model[:4](x)
        if road == "forward called directly":
            out = model[4].forward(h)
        else:
            out = nn.functional.linear(h, model[4].weight)
    with pytest.raises(UncapturedLayerError, match=r"weight '4\.weight'.*exclude='4'"):
        out.sum().backward()
    rule.detach()
    attach(rule, model, exclude="4")  # the cure that the message names
    nn.functional.linear(model[:4](x), model[4].weight).sum().backward()
