"""Parts of a network with a backward pass of their own: adjoint blocks, reentrant checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import plywise as pw

EVERY = {"stats_every": 1, "refresh_every": 1}
RULES: dict[str, Any] = {
    "Backprop": pw.Backprop,
    "ProxProp": pw.ProxProp,
    "NLMS": pw.NLMS,
    "exact BackMatching": lambda: pw.BackMatching(mode="exact"),
    "Foof": lambda: pw.Foof(**EVERY),
    "Foof, every 3": lambda: pw.Foof(stats_every=3, refresh_every=3),
    "RLS": pw.RLS,
    "KFAC": lambda: pw.KFAC(**EVERY),
    "Coordinates": lambda: pw.Coordinates(**EVERY),
}


class Adjoint(torch.autograd.Function):
    """Keeps the input only, and runs the block again in backward, as solvers of neural ODEs do."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            output = ctx.block(x)
        return None, *torch.autograd.grad(output, (x, *ctx.parameters), delta)


class Network(nn.Module):
    def __init__(self, calls: int, is_adjoint: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.calls, self.is_adjoint = calls, is_adjoint

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        for _ in range(self.calls):
            if self.is_adjoint:
                hidden = Adjoint.apply(self.block, hidden, *self.block.parameters())
            else:
                hidden = self.block(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", list(RULES))
def test_a_block_that_backward_runs_again_trains_as_it_would_otherwise(name: str, calls: int) -> None:
    ends = []
    for is_adjoint in (False, True):
        model = Network(calls, is_adjoint).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        rule = RULES[name]().attach(model, optimizer)
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(20, 6, dtype=torch.float64, generator=generator)).square().mean().backward()
            optimizer.step()
        assert rule.explain().share == 1
        assert not rule.health.counts
        ends.append(dict(model.named_parameters()))
    for key, plain in ends[0].items():
        torch.testing.assert_close(ends[1][key], plain, rtol=1e-7, atol=1e-9)


def test_back_matching_refuses_a_graph_in_which_it_cannot_measure() -> None:
    model = Network(1, is_adjoint=True)
    rule = pw.BackMatching().attach(model, torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(pw.PlywiseError, match=r"hides the part with 'block\.0\.weight'.*exclude='block\.0'"):
        model(torch.randn(20, 6)).square().mean().backward()
    rule.detach()
    rule.attach(model, torch.optim.SGD(model.parameters(), lr=0.05), exclude="block.0")
    model(torch.randn(20, 6)).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


class Flattening(nn.Module):
    """A part of a network in which samples and positions are one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 6)).tanh().reshape(x.shape)


class Layered(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.inner, self.last = nn.Linear(6, 6), Flattening(), nn.Linear(6, 2)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else self.again(x)

    def again(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.middle(self.first(x))))


@pytest.mark.parametrize(
    "make_rule",
    [
        pw.Consequentialism,
        lambda: pw.NLMS(reduction="sum"),
        lambda: pw.BackMatching(mode="exact"),
        lambda: pw.ProxProp(last_layer="explicit"),
    ],
    ids=["CWU", "NLMS of a sum", "exact", "explicit"],
)
def test_a_part_that_runs_again_belongs_to_the_batch_around_it(make_rule: Callable[[], pw.Rule]) -> None:
    """The number of samples is that of the batch, and no layer inside of it is the last one."""
    found = {}
    for reentrant in (None, False, True):
        model = Layered(reentrant)
        rule = make_rule().attach(model)
        torch.manual_seed(1)
        model(torch.randn(4, 5, 6)).square().sum((1, 2)).mean().backward()
        found[reentrant] = [p.grad for p in model.parameters()]
        rule.detach()
    for reentrant in (False, True):
        for one, two in zip(found[reentrant], found[None], strict=True):
            torch.testing.assert_close(one, two)
