"""Two real processes: replicas stay equal bit for bit, gradients are the mean of both ranks' moves."""

from typing import Any

import pytest

from plywise.testing.cases import Case
from plywise.testing.contract.ddp_worker import PLANS, main
from plywise.testing.contract.models import are_finite, assert_close, have_same_bits
from plywise.testing.processes import run_two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.sends_rule]


@pytest.fixture(scope="module")
def ranks(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What the two processes saw; one pair of processes runs all rules."""
    rules = {case.name: case.make() for case in cases}
    return run_two_ranks(main, tmp_path_factory.mktemp("ddp"), rules)


@pytest.mark.parametrize(("kind", "first"), PLANS)
def test_two_processes(case: Case, ranks: list[dict[str, Any]], kind: str, first: str) -> None:
    one, two = (seen[f"{case.name} {kind} {first}"] for seen in ranks)
    assert have_same_bits(one["start"], two["start"])
    assert not have_same_bits(one["own"], two["own"])
    mean = {name: (g + two["own"][name]) / 2 for name, g in one["own"].items()}
    assert_close(one["averaged"], mean, 1e-6)
    assert have_same_bits(one["averaged"], two["averaged"])
    assert have_same_bits(one["weights"], two["weights"])
    assert not have_same_bits(one["weights"], one["start"])
    # a NaN on one rank: both skip
    assert (one["skipped"], two["skipped"]) == (1, 1)
    assert have_same_bits(one["after NaN"], one["weights"])
    assert have_same_bits(two["after NaN"], one["weights"])
    assert have_same_bits(one["at the end"], two["at the end"])
    assert are_finite(one["at the end"])
    assert not have_same_bits(one["at the end"], one["weights"])
