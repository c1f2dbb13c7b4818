"""A step that did not happen leaves no trace in the statistics, nor in anything after."""

from plywise.testing.contract.test_memory_no_trace import *
