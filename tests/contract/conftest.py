"""Runs every test that asks for a `case` or a `rule` once for each rule of the registry.

One that asks for a `memory_case` runs for the rules with memory. One with the marker ``one_of_family`` tests
the engine more than a rule: of each family of rules one runs for each value of the other parameters, in turn.
"""

from collections.abc import Iterator

import pytest

from plywise import Rule

from .registry import Case, selected, stands_for_family


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = selected(metafunc.config.getoption("plywise_rule"))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
    if "memory_case" in metafunc.fixturenames:
        remembering = [case for case in cases if case.make().remembers]
        metafunc.parametrize("memory_case", remembering, ids=lambda case: case.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases = selected(config.getoption("plywise_rule"))
    kept, left = [], []
    for item in items:
        (kept if _runs(item, cases) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def _runs(item: pytest.Item, cases: list[Case]) -> bool:
    if item.get_closest_marker("one_of_family") is None:
        return True
    called = item.callspec
    name = "memory_case" if "memory_case" in called.params else "case"
    remembering = [case for case in cases if case.make().remembers] if name == "memory_case" else cases
    turn = sum(index for other, index in called.indices.items() if other != name)
    return stands_for_family(called.params[name], remembering, turn)


@pytest.fixture
def rule(case: Case) -> Iterator[Rule]:
    rule = case.make()
    yield rule
    rule.detach()
