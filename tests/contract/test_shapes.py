"""Dtypes, memory formats, batch shapes and ways to call a layer."""

from plywise.testing.contract.test_shapes import *
