"""A small network, its optimizer and its inputs, and a rule of each kind."""

import torch
from torch import Tensor, nn

import plywise as pw


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
RULES = {
    "Backprop": pw.Backprop,
    "ProxProp": pw.ProxProp,
    "NLMS": pw.NLMS,
    "Foof": lambda: pw.Foof(stats_every=1, refresh_every=1),
}
