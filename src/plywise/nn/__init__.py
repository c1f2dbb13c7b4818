"""Modules of the related papers: each an ordinary `torch.nn.Module`, one file for each paper."""

from plywise.nn.adaptive_activation import AdaptiveActivation, adapt_activations
from plywise.nn.conv_lstm import ConvLSTM
from plywise.nn.decision_stage import DecisionStage
from plywise.nn.threshold import Threshold, ThresholdNetwork
from plywise.nn.unfolded_denoiser import UnfoldedDenoiser
from plywise.nn.unroll import unroll
from plywise.nn.vsml import VSML

__all__ = [
    "VSML",
    "AdaptiveActivation",
    "ConvLSTM",
    "DecisionStage",
    "Threshold",
    "ThresholdNetwork",
    "UnfoldedDenoiser",
    "adapt_activations",
    "unroll",
]
