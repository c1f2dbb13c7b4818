"""What the rules' tests share: a layer's move under a rule, and how far two tensors are apart."""

import torch
from torch import Tensor, nn

import plywise as pw


def move_of(rule: pw.Rule, layer: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """``[D, bias]`` of one layer as (outputs, columns), for the gradient ``delta`` at its output."""
    layer.zero_grad()
    rule.attach(layer)
    (layer(x) * delta).sum().backward()
    rule.detach()
    return torch.cat([p.grad.reshape(len(p), -1) for p in layer.parameters()], 1)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
