"""Runs every test that asks for a `case` or a `rule` once for each rule of the registry."""

from collections.abc import Iterator

import pytest

from plywise import Rule

from .registry import Case, selected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = selected(metafunc.config.getoption("plywise_rule"))
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture
def rule(case: Case) -> Iterator[Rule]:
    rule = case.make()
    yield rule
    rule.detach()
