"""Closures, hooks, groups and optimizers of all kinds; detached or dropped, nothing is left."""

from plywise.testing.contract.test_memory_optimizers import *
