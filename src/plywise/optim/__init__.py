"""Optimizers, each an ordinary `torch.optim.Optimizer`, one file for each method."""

from plywise.optim.anchor import ProximalAnchor
from plywise.optim.askew_sgd import ASkewSGD
from plywise.optim.kl_soap import KLSOAP
from plywise.optim.lrsgd import LRSGDC, LRSGDR
from plywise.optim.muon import Muon
from plywise.optim.nor_muon import NorMuon
from plywise.optim.salp_sgd import SalpSGD
from plywise.optim.soap import SOAP
from plywise.optim.yam_adam import YamAdam

__all__ = [
    "KLSOAP",
    "LRSGDC",
    "LRSGDR",
    "SOAP",
    "ASkewSGD",
    "Muon",
    "NorMuon",
    "ProximalAnchor",
    "SalpSGD",
    "YamAdam",
]
