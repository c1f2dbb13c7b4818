"""Attached, the model is the user's own; detached or dropped, nothing is left."""

from plywise.testing.contract.test_unmodified import *
