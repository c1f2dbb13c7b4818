"""The optimizers that rules are compared with, beside torch's own: Muon, SOAP and Shampoo.

They come from the package `pytorch_optimizer` (extra "bench"); its Muon flattens a convolution's weight,
which torch's does not.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_optimizer import SOAP, Muon, ScalableShampoo
from torch import nn
from torch.optim import Optimizer


def muon(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Muon for hidden weights, AdamW at a tenth of its rate for biases and the last layer."""
    return Muon(
        [{"params": group, "use_muon": use} for group, use in _hidden(parameters)],
        lr=rate,
        adamw_lr=rate / 10,
    )


class TorchMuon(Optimizer):
    """torch's Muon for hidden weights and AdamW for the rest, as one optimizer (for timing)."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        hidden, rest = (group for group, _ in _hidden(parameters))
        self.parts = [torch.optim.Muon(hidden, lr=rate), torch.optim.AdamW(rest, lr=rate / 10)]
        super().__init__([*hidden, *rest], {})

    def step(self, closure: Any = None) -> None:
        """A step of both."""
        for part in self.parts:
            part.step()


def soap(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """SOAP with its defaults: a new eigenbasis every 10 steps."""
    return SOAP(parameters, lr=rate, weight_decay=0.0)


def shampoo(parameters: Iterable[nn.Parameter], rate: float, every: int = 25) -> Optimizer:
    """Shampoo grafted onto SGD, its roots anew every 25 steps (its default, 1000, is more than a run)."""
    return ScalableShampoo(
        parameters,
        lr=rate,
        betas=(0.9, 0.999),
        start_preconditioning_step=every,
        preconditioning_compute_steps=every,
    )


def _hidden(parameters: Iterable[nn.Parameter]) -> list[tuple[list[nn.Parameter], bool]]:
    """Weights of all layers but the last, and the others."""
    every = list(parameters)
    weights = [p for p in every if p.dim() > 1]
    hidden = {id(p) for p in weights[:-1]}
    return [
        ([p for p in every if id(p) in hidden], True),
        ([p for p in every if id(p) not in hidden], False),
    ]
