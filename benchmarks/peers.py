"""The optimizers that rules are compared with, as the published figures have them.

Shampoo is the arena's (`plywise.arena.methods.peers`). The Muon and the SOAP that figures for training were
taken with are those of the package `pytorch_optimizer` (extra "bench"); torch's Muon is for timing. Muons
split the parameters by their order, since a benchmark's network has its last layer last. What they cost
beside plywise's own: `peers_cost.py`.
"""

from collections.abc import Iterable

import torch
from pytorch_optimizer import SOAP, Muon
from torch import nn
from torch.optim import Optimizer

from plywise.arena.methods.peers import shampoo

__all__ = ["muon", "shampoo", "soap", "torch_muon"]


def muon(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Muon for hidden weights, AdamW at a tenth of its rate for biases and the last layer."""
    return Muon(
        [
            {"params": group, "use_muon": use}
            for group, use in zip(split_hidden(parameters), (True, False), strict=True)
        ],
        lr=rate,
        adamw_lr=rate / 10,
    )


def soap(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """SOAP with its defaults: a new eigenbasis every 10 steps."""
    made: Optimizer = SOAP(parameters, lr=rate, weight_decay=0.0)
    return made


class Both:
    """Two optimizers that step one after the other."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def torch_muon(parameters: Iterable[nn.Parameter], rate: float) -> Both:
    """Muon as torch has it for hidden matrices, and AdamW for the rest (for timing)."""
    hidden, rest = split_hidden(parameters)
    muon = torch.optim.Muon(hidden, lr=rate, adjust_lr_fn="match_rms_adamw")
    return Both(muon, torch.optim.AdamW(rest, lr=rate))


def split_hidden(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of all layers but the last, and the others."""
    every = list(parameters)
    weights = [p for p in every if p.dim() > 1]
    hidden = {id(p) for p in weights[:-1]}
    return [p for p in every if id(p) in hidden], [p for p in every if id(p) not in hidden]
