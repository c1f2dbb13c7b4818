"""Activation checkpointing: the same gradients, and its memory saving kept."""

from plywise.testing.contract.test_checkpoint import *
