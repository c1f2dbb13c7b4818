"""Activation checkpointing: the same gradients, and its memory saving kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from plywise import PlywiseError, Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import copy_gradients, have_same_bits, make_batch


class Deep(nn.Module):
    """Blocks with dropout (its mask must be drawn again) and a residual path, each checkpointed or not."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8)) for _ in range(3)
        )
        self.last = nn.Linear(8, 3)
        self.call = call or (lambda block, h: block(h))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + self.call(block, h)
        return self.last(h)


def checkpoint_nested(block: nn.Module, h: Tensor) -> Tensor:
    inner = block[:2]
    return checkpoint(lambda t: block[2:](checkpoint(inner, t, use_reentrant=False)), h, use_reentrant=False)


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda block, h: checkpoint(block, h, use_reentrant=True),
    "not reentrant": lambda block, h: checkpoint(block, h, use_reentrant=False),
    "nested": checkpoint_nested,
}


def compute_rule_gradients(model: nn.Module, rule: Rule) -> dict[str, Tensor]:
    attach(rule, model, warm=(6,))
    torch.manual_seed(5)
    x, y = make_batch()
    nn.functional.cross_entropy(model(x), y).backward()
    return copy_gradients(model)


@pytest.mark.one_of_family
@pytest.mark.parametrize("how", list(CALLS))
def test_gradients_are_the_same(case: Case, how: str) -> None:
    expected = compute_rule_gradients(Deep(None), case.make())
    if case.refuses_reentrant and how == "reentrant":
        with pytest.raises(PlywiseError, match=r"below layer 'last'.*use_reentrant=False"):
            compute_rule_gradients(Deep(CALLS[how]), case.make())
    else:
        assert have_same_bits(compute_rule_gradients(Deep(CALLS[how]), case.make()), expected)


@pytest.mark.one_of_family
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(case: Case, use_reentrant: bool) -> None:
    x, y = make_batch()

    def run(segments: int) -> dict[str, Tensor]:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        attach(case.make(), model, warm=(6,))
        z = x.clone().requires_grad_()
        if segments:
            out = checkpoint_sequential(model, segments, z, use_reentrant=use_reentrant)
        else:
            out = model(z)
        nn.functional.cross_entropy(out, y).backward()
        return {**copy_gradients(model), "input": z.grad}

    expected = run(0)
    if case.refuses_reentrant and use_reentrant:
        with pytest.raises(PlywiseError, match="use_reentrant=False"):
            run(2)
    else:
        assert have_same_bits(run(2), expected)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_the_memory_is_saved(rule: Rule, how: str) -> None:
    model = Deep(CALLS[how])
    attach(rule, model)
    inner: list[StorageWeakRef] = []
    for block in model.blocks:
        block[3].register_forward_pre_hook(
            lambda module, args: inner.append(StorageWeakRef(args[0].untyped_storage()))
        )
    loss = model(make_batch()[0]).sum()
    assert len(inner) == 3
    assert all(ref.expired() for ref in inner)  # what is inside a block waits for nobody
    assert loss.requires_grad


def test_recomputation_in_no_backward_leaves_no_trace(case: Case) -> None:
    expected = compute_rule_gradients(Deep(None), case.make())
    model = Deep(CALLS["not reentrant"])
    rule = case.make()
    attach(rule, model, warm=(6,))
    model(make_batch(seed=9)[0])  # discarded
    with torch.no_grad():
        model(make_batch(seed=9)[0])
    rule.detach()
    assert have_same_bits(compute_rule_gradients(model, rule), expected)
