"""Optimizers that step in backward, as soon as a parameter's gradient has arrived."""

import pytest
import torch
from torch import Tensor, nn

import plywise as pw


class Mixed(nn.Module):
    """Calls of all sorts that autograd differentiates itself, above a layer that needs their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 8)
        self.norm, self.scale = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.join = nn.Bilinear(8, 8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.table(x)))
        hidden = torch.einsum("bd,ed->be", torch.tanh(self.scale(hidden)), self.mix)
        return self.last(self.join(hidden, hidden))


def step_in_backward(model: nn.Module) -> None:
    """Let every parameter take its step when its gradient arrives."""

    def move(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.05)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(move)


def train(make: type[pw.Rule] | None, is_first: bool = True) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights under a rule that is attached before the hooks, or after them."""
    model, x, losses = Mixed(), torch.arange(9), []
    if make is not None and is_first:
        make().attach(model, kinds="all")
    step_in_backward(model)
    if make is not None and not is_first:
        make().attach(model, kinds="all")
    for _ in range(4):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses, list(model.parameters())


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("make", [pw.Backprop, pw.BackMatching, pw.NLMS])
def test_weights_move_before_autograd_has_gone_through_their_calls(make, is_first: bool) -> None:
    losses, weights = train(make, is_first)
    assert losses[-1] < losses[0]
    if make is pw.Backprop:
        for weight, plain in zip(weights, train(None)[1], strict=True):
            torch.testing.assert_close(weight, plain)
