"""The memory travels in the optimizer's state: bit for bit, and never into another model or rule."""

from plywise.testing.contract.test_memory_resume import *
