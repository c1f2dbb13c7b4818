"""Tensor parallelism, DDP's join() and pipelines, on two real processes: equal, or refused by name."""

from typing import Any

import pytest
import torch
from parallel_worker import PIPED, PIPELINES, RULES, SPREAD, main, run_join_alone, run_pipeline_alone
from torch import Tensor

from processes import run_two_ranks

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9
EXCHANGING = ("BackMatching", "Foof", "KFAC", "RLS", "Coordinates", "Coordinates of both sides")
"""Rules whose processes exchange something at every step."""

Seen = dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw; one pair of them runs everything."""
    return run_two_ranks(main, tmp_path_factory.mktemp("parallel"))


def assert_same(first: Seen, second: Seen) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=TOLERANCE, atol=TOLERANCE)


# ---- tensor parallelism -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("way", ["after", "before"])
def test_spread_weights_are_left_to_the_optimizer(ranks: list[dict[str, Any]], name: str, way: str) -> None:
    for rank in ranks:
        seen = rank[f"{name} tensor parallel"]
        assert_same(seen[way], seen["alone"])
        assert [(layer, handled) for layer, handled, _ in seen[f"{way}: rows"]] == [
            ("0", False),
            ("2", False),
            ("4", True),
        ]
        assert all("spread over processes" in why for _, handled, why in seen[f"{way}: rows"] if not handled)
        assert not seen[f"{way}: said"]  # all processes have the same rows: nothing to average


def test_tensor_parallelism_is_refused_before_a_wrong_number(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["tensor parallel refused"]
        assert "AttachError" in said["optimizer before"]
        assert "parallelize_module has replaced '0.weight'" in said["optimizer before"]
        assert "finds no layer to handle" in said["nothing left"]
        assert "'0': its weight is spread over processes" in said["nothing left"]
        assert "PlywiseError" in said["altered"]
        assert "sends other values down than gradients" in said["altered"]


def test_weights_that_are_spread_twice_are_left_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        rows = rank["tensor parallel refused"]["spread twice"]
        assert [handled for _, handled, _ in rows] == [False, False, True]
        assert all("spread twice" in why for _, handled, why in rows if not handled)


# ---- join -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RULES if name not in EXCHANGING])
def test_join_is_equal_to_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    """12 and 23 batches; the second process goes on alone, and both have its weights in the end."""
    one, two = (rank[f"{name} join"] for rank in ranks)
    assert one["said"] == two["said"] == "nothing"
    assert_same(two["end"], run_join_alone(name))
    assert_same(*({key: v for key, v in seen["end"].items() if "/" not in key} for seen in (one, two)))


@pytest.mark.parametrize("name", EXCHANGING)
def test_join_is_refused_by_name(ranks: list[dict[str, Any]], name: str) -> None:
    """In the first forward, on both processes, before anybody waits."""
    for rank in ranks:
        said = rank[f"{name} join"]["said"]
        assert "PlywiseError" in said
        assert "cannot train inside DistributedDataParallel.join()" in said
        assert ("Back-matching" if name == "BackMatching" else name.removesuffix(" of both sides")) in said


# ---- pipelines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPED)
@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_are_equal_to_one_process(ranks: list[dict[str, Any]], name: str, kind: str) -> None:
    for number, rank in enumerate(ranks):
        seen = rank[f"{name} {kind}"]
        assert_same(seen["end"], run_pipeline_alone(name, kind, number))
        assert not seen["said"]


def test_pipelines_are_refused_where_a_stage_is_not_enough(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["pipelines refused"]
        assert (
            "a stage of torch.distributed.pipelining does not see those of later stages"
            in said["BackMatching"]
        )
        assert "sends other values down than gradients" in said["BackMatching exact"]
