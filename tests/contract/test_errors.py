"""Errors say what, where, why and what to do; layers can be chosen in every form."""

from plywise.testing.contract.test_errors import *
