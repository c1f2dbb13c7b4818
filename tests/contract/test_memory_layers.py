"""Frozen, thawed, replaced, lazy and shared layers: the memory follows, or the rule says why not."""

from plywise.testing.contract.test_memory_layers import *
