"""Tied, shared, unused, frozen, lazy, parametrized, attention, LSTM: right, or routed with a reason."""

from plywise.testing.contract.test_structures import *
