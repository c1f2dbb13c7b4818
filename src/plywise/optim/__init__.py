"""Optimizers of the related papers: each an ordinary `torch.optim.Optimizer`, one file a paper."""

from plywise.optim.anchor import ProximalAnchor
from plywise.optim.askew_sgd import ASkewSGD
from plywise.optim.lrsgd import LRSGDC, LRSGDR
from plywise.optim.salp_sgd import SalpSGD
from plywise.optim.yam_adam import YamAdam

__all__ = ["LRSGDC", "LRSGDR", "ASkewSGD", "ProximalAnchor", "SalpSGD", "YamAdam"]
