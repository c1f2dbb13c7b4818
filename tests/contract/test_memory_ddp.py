"""Two real processes with half of each batch: together they are one process with all of it."""

from plywise.testing.contract.test_memory_ddp import *
