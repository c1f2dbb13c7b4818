"""Losses and penalties of the related papers, one file for each paper."""

from plywise.losses.auc_margin import AUCMargin
from plywise.losses.coda import CoDA
from plywise.losses.input_gradient_penalty import input_gradient_difference, input_gradient_penalty
from plywise.losses.slope_recovery import slope_recovery
from plywise.losses.spauc import SPAUC
from plywise.losses.wasserstein_proximal import wasserstein_proximal

__all__ = [
    "SPAUC",
    "AUCMargin",
    "CoDA",
    "input_gradient_difference",
    "input_gradient_penalty",
    "slope_recovery",
    "wasserstein_proximal",
]
