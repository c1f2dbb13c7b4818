"""torch.compile before attaching is fine; after the first compiled call it is noticed."""

from plywise.testing.contract.test_compile import *
