"""Exact back-matching alters what it sends down at every product, however torch makes it.

Products with strided inputs, einsums, experts and transposed convolutions send the matched value, not ``ΔW``;
a backward that wants no updates is plain, to the bit.
"""

from collections.abc import Callable

import pytest
import torch
from algebra import relative
from torch import Tensor, nn

import plywise as pw

EPS = 0.1


class Strided(nn.Module):
    """A linear layer over the other axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT)

    def rows(self, x: Tensor) -> Tensor:
        return x.mT.reshape(1, -1, 4)

    def weights(self) -> Tensor:
        return self.layer.weight.unsqueeze(0)


class StridedProduct(Strided):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT @ self.layer.weight.T


class Einsum(nn.Module):
    """Products with a weight for each of some experts, with axes in any order."""

    def __init__(self, equation: str, out: str) -> None:
        super().__init__()
        self.equation, self.out = equation, out
        self.weight = nn.Parameter(torch.randn(6, 4, 3))  # experts, inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)

    def rows(self, x: Tensor) -> Tensor:  # x is (rows, inputs, experts)
        return x.permute(2, 0, 1)

    def weights(self) -> Tensor:
        return self.weight.mT

    def delta_rows(self, delta: Tensor) -> Tensor:
        return torch.einsum(f"{self.out}->enm", delta)


MAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "strided": (Strided, (5, 4, 6)),
    "strided product": (StridedProduct, (5, 4, 6)),
    "einsum": (lambda: Einsum("nde,edm->nem", "nem"), (5, 4, 6)),
    "einsum, other order": (lambda: Einsum("nde,edm->men", "men"), (5, 4, 6)),
}


def backward(model: nn.Module, x: Tensor, rule: pw.Rule | None) -> tuple[Tensor, Tensor]:
    """The gradient at the input, and that at the output."""
    point = x.clone().requires_grad_()
    if rule is not None:
        rule.attach(model)
    out = model(point)
    out.retain_grad()
    out.sin().sum().backward()
    if rule is not None:
        rule.detach()
    return point.grad, out.grad


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", list(MAPS))
def test_what_is_sent_down_is_the_matched_value(name: str) -> None:
    make, shape = MAPS[name]
    torch.manual_seed(1)
    model, x = make(), torch.randn(shape)
    below, delta = backward(model, x, pw.BackMatching("exact", eps=EPS))
    rows = model.delta_rows(delta) if isinstance(model, Einsum) else delta.reshape(1, -1, 3)
    W = model.weights().detach()
    damping = EPS * W.square().sum((1, 2)) / 3
    matched = rows @ torch.linalg.solve(W @ W.mT + damping[:, None, None] * torch.eye(3), W)
    assert relative(model.rows(below), matched) < 1e-10


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"stride": 2, "output_padding": 1, "dilation": 2}])
def test_transposed_convolutions_match_too(settings: dict[str, int]) -> None:
    """Few inputs, so that the steps of conjugate gradients reach the solution."""
    torch.manual_seed(1)
    model, x = nn.ConvTranspose1d(2, 3, 3, **settings), torch.randn(5, 2, 3)
    below, delta = backward(model, x, pw.BackMatching("exact", eps=EPS))
    J = torch.autograd.functional.jacobian(lambda v: model(v.reshape(1, 2, 3)).flatten(), torch.zeros(6))
    damping = EPS * J.square().sum() / min(J.shape)
    matched = torch.linalg.solve(J.T @ J + damping * torch.eye(6), J.T @ delta.flatten(1).T).T
    assert relative(below.flatten(1), matched) < 1e-6


@pytest.mark.usefixtures("double")
def test_batched_experts_are_matched_each_with_its_own_damping() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(6, 4, 3), torch.randn(6, 5, 4)
    weight[0] *= 100

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight)

    below, delta = backward(Experts(), x, pw.BackMatching("exact", eps=EPS))
    for place, W in enumerate(weight.mT):
        damped = W @ W.T + EPS * W.square().sum() / 3 * torch.eye(3)
        assert relative(below[place], delta[place] @ torch.linalg.solve(damped, W)) < 1e-10


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **MAPS,
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (5, 4, 6, 6)),
    "without a batch": (lambda: nn.ConvTranspose1d(4, 3, 3), (4, 6)),
}


class Below(nn.Module):
    """A layer below a map, so that the values sent down arrive in a weight."""

    def __init__(self, top: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.top = nn.Linear(width, width), top

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_backward_that_wants_no_updates_is_plain_to_the_bit(name: str) -> None:
    make, shape = OTHERS[name]
    found = []
    for is_attached in (False, True):
        torch.manual_seed(1)
        model, x = Below(make(), shape[-1]), torch.randn(shape).requires_grad_()
        if is_attached:
            pw.BackMatching("exact").attach(model)
        (plain,) = torch.autograd.grad(model(x).sin().sum(), x)
        (graph,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(graph.square().sum(), x)
        found.append((model(x).detach(), plain, second))
        if is_attached:
            model(x).sin().sum().backward()
            assert not torch.allclose(x.grad, plain, rtol=0.1)
    for mine, yours in zip(*found, strict=True):
        assert torch.equal(mine, yours) or (mine is found[0][2] and torch.allclose(mine, yours, rtol=1e-5))


@pytest.mark.parametrize("name", list(OTHERS))
def test_under_autocast(name: str) -> None:
    make, shape = OTHERS[name]
    torch.manual_seed(1)
    model, x = Below(make(), shape[-1]), torch.randn(shape).requires_grad_()
    found = []
    for is_attached in (False, True):
        if is_attached:
            pw.BackMatching("exact").attach(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().sin().sum()
        found.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*found)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().sin().sum()
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not torch.allclose(x.grad, found[0], rtol=0.1)
