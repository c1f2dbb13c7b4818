"""One input of every module of torch's list, under four rules, and torch's own checks under the identity.

All inputs, dtypes, modes and rules: ``python -m tests.sweep.run``.
"""

import pytest

from .database import find_names, load_infos
from .selection import sweep_quickly


def test_names_are_those_of_torch():
    assert find_names() == list(load_infos())
    assert len(find_names()) > 100


@pytest.mark.parametrize("module", find_names())
def test_module(module):
    report = sweep_quickly(module)
    assert not report.problems, "\n".join(map(str, report.problems))
    if not report.held:
        pytest.skip("; ".join(report.skipped))
