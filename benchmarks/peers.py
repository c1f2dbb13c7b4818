"""Make the optimizers that the published figures compare rules with.

Shampoo comes from the arena (`plywise.arena.methods.peers`). The figures for training use Muon and SOAP from
the package `pytorch_optimizer` (extra "bench"); torch's Muon is used for timing only. Muon gets its
parameters by their order, since the last layer of a benchmark's network is also the last in the list.
`peers_cost.py` compares the cost of these optimizers with that of plywise's.
"""

from collections.abc import Iterable

import torch
from pytorch_optimizer import SOAP, Muon
from torch import nn
from torch.optim import Optimizer

from plywise.arena.methods.peers import shampoo

__all__ = ["muon", "shampoo", "soap", "torch_muon"]


def muon(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Make Muon for hidden weights, and AdamW at a tenth of its rate for biases and the last layer."""
    return Muon(
        [
            {"params": group, "use_muon": use}
            for group, use in zip(split_hidden(parameters), (True, False), strict=True)
        ],
        lr=rate,
        adamw_lr=rate / 10,
    )


def soap(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Make SOAP with its defaults: a new eigenbasis every 10 steps."""
    optimizer: Optimizer = SOAP(parameters, lr=rate, weight_decay=0.0)
    return optimizer


class OptimizerSequence:
    """Several optimizers that step one after the other."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def torch_muon(parameters: Iterable[nn.Parameter], rate: float) -> OptimizerSequence:
    """Make torch's Muon for hidden matrices, and AdamW for the rest (for timing)."""
    hidden, rest = split_hidden(parameters)
    muon = torch.optim.Muon(hidden, lr=rate, adjust_lr_fn="match_rms_adamw")
    return OptimizerSequence(muon, torch.optim.AdamW(rest, lr=rate))


def split_hidden(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of all layers except the last, and all other parameters."""
    every = list(parameters)
    weights = [p for p in every if p.dim() > 1]
    hidden = {id(p) for p in weights[:-1]}
    return [p for p in every if id(p) in hidden], [p for p in every if id(p) not in hidden]
