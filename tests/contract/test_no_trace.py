"""A step that did not happen leaves no trace."""

from plywise.testing.contract.test_no_trace import *
