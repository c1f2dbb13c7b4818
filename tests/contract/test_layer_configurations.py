"""Drawn layers and call orders: Backprop is autograd, every rule gives finite moves of the right shape."""

from plywise.testing.contract.test_layer_configurations import *
