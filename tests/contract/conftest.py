"""Puts the contract of `plywise.testing` to each rule and each learner that ships."""

import pytest

from plywise.testing import plugin
from plywise.testing.cases import Case

from .learners import CASES as LEARNERS
from .registry import selected

rule = plugin.rule


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """All rules that are checked."""
    return selected(request.config.getoption("plywise_rule"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plugin.parametrize(metafunc, selected(metafunc.config.getoption("plywise_rule")), LEARNERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    plugin.select(config, items, selected(config.getoption("plywise_rule")))
