"""A plugin of pytest that runs the tests of the contract on rules and learners."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from plywise.engine.rule import Rule
from plywise.testing.cases import Case, LearnerCase, describe_error, find_why_stuck, select_family

MARKERS = (
    "slow: takes more than a few seconds",
    "one_of_family: for each value of the other parameters, one rule of each family",
    "sends_rule: other processes have to import the rule's class",
)
CASES = pytest.StashKey[list[Case]]()
"""The key under which a run of the contract keeps its rules."""

SUBJECTS = ("case", "memory_case", "learner_case")
"""The arguments of tests that receive a rule, a rule with running state, or a learner."""


def parametrize(
    metafunc: pytest.Metafunc, cases: Sequence[Case], learner_cases: Sequence[LearnerCase]
) -> None:
    """Run a test that has a ``case``, a ``memory_case`` or a ``learner_case`` as argument once for each."""
    remembering = [case for case in cases if case.make().remembers]
    for name, found in zip(SUBJECTS, (cases, remembering, learner_cases), strict=True):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found, ids=lambda case: case.name)


def select(config: pytest.Config, items: list[pytest.Item], cases: Sequence[Case]) -> None:
    """Keep, of tests that are marked ``one_of_family``, those of one rule of each family.

    Such a test is about the engine rather than about a rule.
    """
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        (kept if _has_turn(item, cases) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def _has_turn(item: Any, cases: Sequence[Case]) -> bool:
    if item.get_closest_marker("one_of_family") is None:
        return True
    called = item.callspec
    name = "memory_case" if "memory_case" in called.params else "case"
    remembering = [case for case in cases if case.make().remembers] if name == "memory_case" else cases
    turn = sum(index for other, index in called.indices.items() if other != name)
    return select_family(called.params[name], remembering, turn)


def _has_subject(item: Any) -> bool:
    """Tell whether a test is about a rule or a learner that is checked."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(value, Case | LearnerCase) for value in values)


@pytest.fixture
def rule(case: Case) -> Iterator[Rule]:
    """A new rule of the case, detached at the end."""
    made = case.make()
    yield made
    made.detach()


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """All rules that are checked."""
    return request.config.stash[CASES]


LONGEST = 500
"""The largest number of characters of a reason."""


def find_reason(error: BaseException, trace: Sequence[Any]) -> str:
    """Return why a test failed, in a line: what it found, or what was raised and where in the user's code.

    Args:
        error: what the test raised.
        trace: the entries of pytest's traceback, outermost first.
    """
    text = str(error).strip()
    if isinstance(error, pytest.fail.Exception):
        reason = text
    elif isinstance(error, AssertionError):
        lines = text.splitlines() or [""]  # pytest.raises says below what it expected and what it found
        reason = " ".join(text.split()) if lines[0].startswith("Regex pattern") else lines[0]
        if trace and (reason.startswith("assert ") or len(reason.split()) < 4):  # no sentence: show the code
            reason = f"{reason.removeprefix('assert ')} ({' '.join(str(trace[-1].statement).split())})"
    else:
        reason = describe_error(error)
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} …"


class ContractPlugin:
    """Runs the contract on some rules and learners, and keeps the results.

    Args:
        cases: the rules.
        learner_cases: the learners.
    """

    def __init__(self, cases: Sequence[Case], learner_cases: Sequence[LearnerCase]) -> None:
        self._cases, self._learner_cases = list(cases), list(learner_cases)
        self._stuck = next(filter(None, (find_why_stuck(case.make()) for case in cases)), "")
        self.passed = 0
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        """Of failed tests: the promise, where the test states one, and why the test failed, in a line."""

    def pytest_configure(self, config: pytest.Config) -> None:
        """Register the markers, and pass the rules to the fixture `cases`."""
        config.stash[CASES] = self._cases
        for marker in MARKERS:
            config.addinivalue_line("markers", marker)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """See `parametrize`."""
        parametrize(metafunc, self._cases, self._learner_cases)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out tests that are about no rule and no learner, or for which there is none of the kind."""
        items[:] = [item for item in items if _has_subject(item)]
        select(config, items, self._cases)
        for item in items:
            if self._stuck and item.get_closest_marker("sends_rule"):
                item.add_marker(pytest.mark.skip(reason=self._stuck))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be read."""
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Note why a test failed."""
        if not call.excinfo or not isinstance(node, pytest.Item):
            return
        promise = getattr(getattr(node, "obj", None), "__doc__", None) or ""
        reason = find_reason(call.excinfo.value, call.excinfo.traceback)
        self.reasons[node.nodeid] = f"{' '.join(promise.split())} {reason}".strip()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the result of a test."""
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.skipped[report.nodeid] = reason.removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed += 1
