"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import plywise as pw
from plywise.registry.find import RULES

MODULES = [
    "plywise",
    *(m.name for m in pkgutil.walk_packages(pw.__path__, "plywise.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_an_example(rule):
    found = doctest.DocTestFinder(recurse=False).find(getattr(pw, rule), rule)
    assert any(test.examples for test in found)
