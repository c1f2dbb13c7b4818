"""How many trainings run at once where nobody says so."""

import os

import pytest

from plywise._util.environment import cores, workers_for


def test_cores_are_shared_among_threads_and_a_gpu_is_not_shared():
    assert workers_for("cpu", 1) == cores()
    assert workers_for("cpu", cores()) == 1
    assert workers_for("cpu", 10 * cores()) == 1
    assert [workers_for(device, 1) for device in ("cuda", "cuda:1", "mps")] == [1, 1, 1]


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores"
)
def test_cores_are_those_that_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
