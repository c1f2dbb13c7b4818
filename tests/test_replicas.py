"""Who does which work; with one process, nothing is sent anywhere."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plywise.engine.processes.replicas import Job, Replicas, deal_out


def loads(costs: list[float], size: int) -> list[float]:
    owner = deal_out(dict(enumerate(costs)), [0.0] * size)
    assert owner.keys() == set(range(len(costs)))
    assert set(owner.values()) <= set(range(size))
    return [sum(c for i, c in enumerate(costs) if owner[i] == rank) for rank in range(size)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(1, 9))
def test_no_process_has_much_more_than_another(costs, size):
    load = loads(costs, size)
    assert sum(load) == sum(costs)
    assert max(load) - min(load) <= max(costs, default=0)
    assert size * max(load) <= sum(costs) + (size - 1) * max(costs, default=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
def test_the_dearest_share_is_at_most_four_thirds_of_the_best(costs, size):
    """Graham's bound for the most expensive first, 4/3 - 1/(3·processes), against every way to share out."""
    best = min(
        max(sum(c for c, r in zip(costs, owners, strict=True) if r == rank) for rank in range(size))
        for owners in itertools.product(range(size), repeat=len(costs))
    )
    assert max(loads(costs, size)) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_equal_jobs_are_dealt_out_evenly(size, count):
    load = loads([2.0] * count, size)
    assert max(load) - min(load) <= 2
    assert max(load) == 2 * -(-count // size)


def test_the_dearest_job_has_a_process_for_itself():
    owner = deal_out(dict(enumerate([1, 2, 100, 3, 4])), [0.0, 0.0])
    assert [job for job, rank in owner.items() if rank == owner[2]] == [2]


def test_alone_the_sum_is_what_there_is():
    parts = {"a": {"gram": torch.randn(1, 2, 2), "rows": torch.tensor(3.0)}, "b": {}}
    alone = Replicas(None)
    total = alone.add_up(parts)
    assert alone.size == 1
    assert total.keys() == parts.keys()
    assert all(total[layer][key] is value for layer, named in parts.items() for key, value in named.items())
    assert Replicas().add_up({}) == {}


def test_alone_every_job_runs_once_and_none_is_blank():
    runs = []

    def refuse():
        raise AssertionError("nobody else does this work")

    def job(name):
        return Job(1.0, refuse, lambda: runs.append(name) or {"root": torch.full((1,), float(len(runs)))})

    results = Replicas(None).share_out({name: job(name) for name in "abc"})
    assert sorted(runs) == ["a", "b", "c"]
    assert {name: result["root"].item() for name, result in results.items()} == {
        name: runs.index(name) + 1.0 for name in "abc"
    }
