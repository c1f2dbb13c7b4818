"""The optimizers that rules are compared with, as the published figures have them.

SOAP, Shampoo and torch's Muon are the arena's (`plywise.arena.methods.peers`). The Muon that figures for
training were taken with is that of the package `pytorch_optimizer` (extra "bench"); it is here. Both split
the parameters by their order, since a benchmark's network has its last layer last.
"""

from collections.abc import Iterable

from pytorch_optimizer import Muon
from torch import nn
from torch.optim import Optimizer

from plywise.arena.methods.peers import MuonAdamW, shampoo, soap

__all__ = ["muon", "shampoo", "soap", "torch_muon"]


def muon(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Muon for hidden weights, AdamW at a tenth of its rate for biases and the last layer."""
    return Muon(
        [
            {"params": group, "use_muon": use}
            for group, use in zip(_hidden(parameters), (True, False), strict=True)
        ],
        lr=rate,
        adamw_lr=rate / 10,
    )


def torch_muon(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """Muon as torch has it for hidden weights, and AdamW for the rest (for timing)."""
    return MuonAdamW(*_hidden(parameters), lr=rate)


def _hidden(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of all layers but the last, and the others."""
    every = list(parameters)
    weights = [p for p in every if p.dim() > 1]
    hidden = {id(p) for p in weights[:-1]}
    return [p for p in every if id(p) in hidden], [p for p in every if id(p) not in hidden]
