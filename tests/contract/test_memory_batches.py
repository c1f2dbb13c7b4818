"""Micro-batches, reused layers, dtypes and loss scales: the statistics are those of the whole batch."""

from plywise.testing.contract.test_memory_batches import *
