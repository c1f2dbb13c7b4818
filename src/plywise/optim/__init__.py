"""Optimizers of the related papers: each an ordinary `torch.optim.Optimizer`, one file a paper."""

from plywise.optim.anchor import ProximalAnchor

__all__ = ["ProximalAnchor"]
