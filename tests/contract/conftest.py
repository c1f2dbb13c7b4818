"""Runs every test that asks for a `case` or a `rule` once for each rule of the registry."""

import re
from collections.abc import Iterator

import pytest

from plywise import Rule

from .known_bugs import KNOWN_BUGS
from .registry import Case, selected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = selected(metafunc.config.getoption("plywise_rule"))
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in KNOWN_BUGS:
            if re.search(rf"contract/test_{pattern}$", item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture
def rule(case: Case) -> Iterator[Rule]:
    rule = case.make()
    yield rule
    rule.detach()
