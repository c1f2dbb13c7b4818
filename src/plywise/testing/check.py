"""Runs the tests of the contract on a user's rule or learner."""

import ast
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plywise._util.suggest import suggestion
from plywise.engine.rule import Rule
from plywise.errors import ContractError, MissingPackageError, TestingError
from plywise.local.learner import Learner
from plywise.testing.cases import Case, LearnerCase, make_case, make_learner_case, try_step

FOLDER = Path(__file__).parent / "contract"
LEARNERS = ("learners", "learner_blocks")
"""The files of tests for learners."""
SHOWN = 3
"""The largest number of reasons that an error gives of a broken promise, and of tests with one reason."""


@dataclass(frozen=True)
class ContractResult:
    """The result of a check; ``print`` it.

    Attributes:
        name: the name of the rule or learner.
        passed: number of tests that passed.
        skipped: tests that were left out, each with the reason.
        failed: tests that failed, each with the report of pytest.
    """

    name: str
    passed: int
    skipped: Mapping[str, str]
    failed: Mapping[str, str]

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {len(self.failed)} failed, {len(self.skipped)} left out"
        reasons = sorted({reason for reason in self.skipped.values() if reason})
        return "\n".join([f"{self.name}: {counts}.", *(f"left out: {reason}" for reason in reasons)])


def list_promises() -> dict[str, str]:
    """List the names that ``only`` of `check_rule` takes, each with its meaning.

    Example:
        >>> list_promises()["no_trace"]
        'A step that did not happen leaves no trace.'
    """
    return {name: sentence for name, sentence in _read_sentences().items() if name not in LEARNERS}


def _read_sentences() -> dict[str, str]:
    """Read what each file of tests says that it checks."""
    paths = sorted(FOLDER.glob("test_*.py"))
    texts = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in paths]
    return {
        path.stem.removeprefix("test_"): text.split("\n")[0] for path, text in zip(paths, texts, strict=True)
    }


def check_rule(factory: Callable[[], Rule] | Case | str, *, only: Sequence[str] = ()) -> ContractResult:
    """Run the tests that every rule of plywise passes on your rule.

    It takes a few minutes; ``only`` selects some of the tests. They run small models on the CPU in this
    process, and some start two more processes. So in a script, call this function below ``if __name__ ==
    "__main__":``, and define the rule in a module that can be imported.

    Args:
        factory: the class of the rule, a function without arguments that makes the rule, ``"module:name"`` of
            either, or a `Case`, which also states at which rates the rule trains and which promises it cannot
            keep.
        only: names of promises, see `list_promises`. Default: all.

    Returns:
        The number of tests that passed, and the tests that were left out, with reasons.

    Raises:
        ContractError: a promise is broken. The message names each, and ``error.result.failed`` holds the
            report of pytest.
        PlywiseError: the factory makes no rule, or one that fails at its first step; ``only`` has an unknown
            name; or pytest or hypothesis is missing.

    Example:
        >>> import plywise as pw
        >>> check_rule(pw.NLMS, only=["ddp"])  # doctest: +SKIP
        ContractResult(name='NLMS', passed=2, skipped={}, failed={})
    """
    promises = list_promises()
    for name in only:
        if name not in promises:
            hint = suggestion(name, tuple(promises)) or f"There are: {', '.join(promises)}."
            raise TestingError(f"No promise is called {name!r}. {hint}".rstrip())
    case = make_case(factory)
    try_step(case)
    return _check(case.name, only or tuple(promises), [case], [])


def check_learner(factory: Callable[..., Learner] | LearnerCase) -> ContractResult:
    """Run the tests that every local learner of plywise passes on your learner. It takes seconds.

    Args:
        factory: called as ``factory(blocks, num_classes, **training)``, where ``training`` holds
            ``optimizer``, ``scheduler``, ``callbacks`` and ``seed``: the learner's class, if it takes these.
            Or a `LearnerCase`, which also states which promises it cannot keep.

    Returns:
        The number of tests that passed, and the tests that were left out, with reasons.

    Raises:
        ContractError: a promise is broken, as in `check_rule`.
        PlywiseError: the factory makes no learner, or one that fails at its first step; or pytest is missing.
    """
    case = make_learner_case(factory)
    return _check(case.name, LEARNERS, [], [case])


def _check(
    name: str, promises: Sequence[str], cases: Sequence[Case], learner_cases: Sequence[LearnerCase]
) -> ContractResult:
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"The contract's tests need {package}: pip install 'plywise[testing]'.")
    if multiprocessing.parent_process() is not None:
        raise TestingError(
            "This process was started by a test of the contract, or by another process. In a script, call "
            'check_rule and check_learner below `if __name__ == "__main__":`.'
        )
    import pytest

    from plywise.testing import plugin as fixtures

    plugin = fixtures.ContractPlugin(cases, learner_cases)
    paths = [str(FOLDER / f"test_{promise}.py") for promise in promises]
    options = ["-c", str(FOLDER / "pytest.ini"), "--rootdir", str(FOLDER), "-q", "--tb=short", "-rN"]
    with _isolate_pytest():
        code = pytest.main([*options, "--no-header", "--no-summary", *paths], plugins=[fixtures, plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not plugin.failed:
        raise TestingError(f"pytest ended with {code!r} before the end.")
    result = ContractResult(name, plugin.passed, plugin.skipped, plugin.failed)
    if result.failed:
        error = ContractError(_describe_failures(result, plugin.reasons))
        error.result = result
        raise error
    return result


@contextmanager
def _isolate_pytest() -> Iterator[None]:
    """Run pytest without other plugins, on one thread of torch, and without files beside the package."""
    import torch

    before = os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    threads, writes = torch.get_num_threads(), sys.dont_write_bytecode
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        sys.dont_write_bytecode = writes
        if before is None:
            del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        else:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = before


def _describe_failures(result: ContractResult, reasons: Mapping[str, str]) -> str:
    """Name the broken promises in a sentence each, with their first tests and what these say.

    A reason that was given before, as of a rule that fails everywhere, is not repeated.
    """
    lines = [f"{result.name} breaks {len(result.failed)} of the contract's tests ({result.passed} pass):"]
    sentences, given = _read_sentences(), set[str]()
    by_promise: dict[str, dict[str, list[str]]] = {}
    for test, account in result.failed.items():
        reason = reasons.get(test) or (account.strip().splitlines() or [""])[-1]
        promise = test.partition(".py")[0].removeprefix("test_")
        by_promise.setdefault(promise, {}).setdefault(reason, []).append(test)
    for promise, by_reason in by_promise.items():
        count = sum(map(len, by_reason.values()))
        lines.append(f"{promise} ({count} failed): {sentences.get(promise, '')}")
        new = [reason for reason in by_reason if reason not in given]
        for reason in new[:SHOWN]:
            tests = [test.partition("::")[2] for test in by_reason[reason]]
            more = f" and {len(tests) - SHOWN} more" if len(tests) > SHOWN else ""
            lines.append(f"  - {', '.join(tests[:SHOWN])}{more}: {reason}")
        known = count - sum(len(by_reason[reason]) for reason in new)
        rest = sum(len(by_reason[reason]) for reason in new[SHOWN:])
        lines += [f"  - {known} tests: as above"] * bool(known) + [f"  - … and {rest} more"] * bool(rest)
        given.update(new[:SHOWN])
    lines.append("error.result.failed has pytest's account of each test.")
    return "\n".join(lines)
