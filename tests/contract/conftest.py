"""Runs every test that asks for a `case` or a `rule` once for each rule of the registry.

One that asks for a `memory_case` runs for the rules with memory.
"""

from collections.abc import Iterator

import pytest

from plywise import Rule

from .registry import Case, selected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = selected(metafunc.config.getoption("plywise_rule"))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
    if "memory_case" in metafunc.fixturenames:
        remembering = [case for case in cases if case.make().remembers]
        metafunc.parametrize("memory_case", remembering, ids=lambda case: case.name)


@pytest.fixture
def rule(case: Case) -> Iterator[Rule]:
    rule = case.make()
    yield rule
    rule.detach()
