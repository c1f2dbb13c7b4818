"""Two real processes: replicas stay equal bit for bit, gradients are the mean of both ranks' moves."""

from plywise.testing.contract.test_ddp import *
