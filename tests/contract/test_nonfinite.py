"""A non-finite value never enters weights or the optimizer's state."""

from plywise.testing.contract.test_nonfinite import *
