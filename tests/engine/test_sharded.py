"""Rules under fully_shard, on two real processes: they do what they do under DistributedDataParallel."""

from typing import Any

import pytest
import sharded_cases
import torch
from sharded_worker import FEW, FOLLOWED, MODELS, RULES, main
from torch import Tensor
from torch.torch_version import TorchVersion

from processes import run_two_ranks

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9
"""Everything is float64; the processes add up in the same order."""

CLIPPED = TOLERANCE if torch.__version__ >= TorchVersion("2.13") else 1e-6
"""The same after clip_grad_norm_: torch 2.9 multiplies sharded gradients by a float32 coefficient."""

WITH_MEMORY = ("Foof", "KFAC", "RLS", "Coordinates")

Seen = dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw that trained each model by each rule."""
    return run_two_ranks(main, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw to which all kinds of things happened."""
    return run_two_ranks(sharded_cases.main, tmp_path_factory.mktemp("cases"))


def assert_same(first: Seen, second: Seen, tolerance: float = TOLERANCE) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def only_weights(seen: Seen) -> Seen:
    return {name: value for name, value in seen.items() if "/" not in name}


# ---- equal to DistributedDataParallel ---------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("way", "kind"), [*(("after", kind) for kind in MODELS), *(("before", kind) for kind in FOLLOWED)]
)
def test_equal_to_ddp(ranks: list[dict[str, Any]], kind: str, name: str, way: str) -> None:
    for rank in ranks:
        replica, sharded = rank[f"ddp {kind} {name}"], rank[f"{way} {kind} {name}"]
        assert_same(sharded["end"], replica["end"])
        assert sharded["share"] == replica["share"] == 1
        assert sharded["handled"] == replica["handled"]
        assert sharded["health"] == replica["health"] == {}
    one, two = (rank[f"{way} {kind} {name}"]["end"] for rank in ranks)
    assert_same(one, two, 0)


@pytest.mark.parametrize("kind", MODELS)
def test_rules_differ(ranks: list[dict[str, Any]], kind: str) -> None:
    """What is compared above is no plain training."""
    plain = only_weights(ranks[0][f"after {kind} Backprop"]["end"])
    for name in RULES:
        end = ranks[0][f"after {kind} {name}"]["end"]
        moved = max(float((only_weights(end)[key] - value).abs().max()) for key, value in plain.items())
        assert (moved > 1e-5) == (name != "Backprop")
        assert any("plywise" in key for key in end) == (name.split()[0] in WITH_MEMORY)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("way", ["each", "last"])
def test_micro_batches(cases: list[dict[str, Any]], name: str, way: str) -> None:
    """Gradients are averaged after each backward pass or after the last one, and then clipped."""
    for rank in cases:
        assert_same(rank[f"{name} micro-batches {way}"], rank[f"{name} micro-batches ddp"], CLIPPED)


@pytest.mark.parametrize("name", FEW)
def test_a_process_without_rows(cases: list[dict[str, Any]], name: str) -> None:
    for rank in cases:
        assert_same(rank[f"{name} without rows sharded"], rank[f"{name} without rows ddp"])


@pytest.mark.parametrize("name", FEW)
def test_embeddings_and_norms(cases: list[dict[str, Any]], name: str) -> None:
    for rank in cases:
        replica, sharded = rank[f"{name} all kinds ddp"], rank[f"{name} all kinds sharded"]
        assert sharded["share"] == replica["share"] == 1
        assert_same(sharded["end"], replica["end"])


@pytest.mark.parametrize("name", FEW)
def test_options_that_change_nothing(cases: list[dict[str, Any]], name: str) -> None:
    """An evaluation before attach, shards along another dimension, activation checkpointing."""
    plain, *others = cases[0][f"{name} options"].values()
    for other in others:
        assert_same(other, plain)


@pytest.mark.parametrize("name", FEW)
def test_mixed_precision(cases: list[dict[str, Any]], name: str) -> None:
    """Forward in bfloat16: weights and statistics stay in float32, and close."""
    plain, mixed = cases[0][f"{name} mixed precision"].values()
    assert mixed.keys() == plain.keys()
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert_same(only_weights(mixed), only_weights(plain), 0.02)


def test_rules_without_an_optimizer(cases: list[dict[str, Any]]) -> None:
    for rank in cases:
        assert_same(rank["no optimizer, sharded"], rank["no optimizer, ddp"])


def test_detached_rules_leave_nothing(cases: list[dict[str, Any]]) -> None:
    assert_same(cases[0]["detached"], cases[0]["plain"], 0)


def test_adamw_in_other_coordinates(cases: list[dict[str, Any]]) -> None:
    for rank in cases:
        assert_same(rank["turned adamw sharded"], rank["turned adamw ddp"])


# ---- steps that do not happen, saving ---------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("where", ["rows", "shard"])
def test_nan_on_one_process_is_skipped_by_both(cases: list[dict[str, Any]], name: str, where: str) -> None:
    for rank in cases:
        seen = rank[f"{name} poisoned {where}"]
        assert seen["skipped"] == 1
        assert_same(seen["after"], seen["before"], 0)
        assert all(bool(value.isfinite().all()) for value in seen["end"].values())
    assert_same(*(rank[f"{name} poisoned {where}"]["end"] for rank in cases), 0)


@pytest.mark.parametrize("name", FEW)
def test_resumed_through_a_distributed_checkpoint(cases: list[dict[str, Any]], name: str) -> None:
    for rank in cases:
        seen = rank[f"{name} resumed"]
        assert_same(seen["resumed"], seen["straight"], 0)


@pytest.mark.parametrize("name", [name for name in FEW if name != "BackMatching"])
def test_resumed_from_a_replica(cases: list[dict[str, Any]], name: str) -> None:
    """Any process's statistics are everybody's, so that a state dict of DDP is one of fully_shard."""
    for rank in cases:
        seen = rank[f"{name} resumed from replica"]
        assert_same(seen["resumed"], seen["straight"])


# ---- work, refusals -----------------------------------------------------------------------------------


def test_each_process_makes_its_share_of_the_updates(cases: list[dict[str, Any]]) -> None:
    """Eight equal layers, four for each."""
    assert [rank["shared out"] for rank in cases] == [[42] * 4] * 2  # with the bias's column


@pytest.mark.parametrize("name", ["ProxProp", "Foof"])
@pytest.mark.parametrize("old", ["kept", "gone"])
def test_optimizer_from_before_is_refused(cases: list[dict[str, Any]], name: str, old: str) -> None:
    for rank in cases:
        said = rank["refused"][f"{name}: optimizer before, {old}"]
        assert "AttachError" in said
        assert "fully_shard or parallelize_module has replaced '0.weight'" in said
        assert "Spread the model first, then make the optimizer" in said


def test_statistics_of_other_processes_are_refused(cases: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(cases):
        said = rank["refused"]["other processes"]
        assert "AttachError: fully_shard spreads '0.weight' over the processes [0, 1]" in said
        assert f"attach(process_group=...) names [{number}]" in said


@pytest.mark.parametrize("name", ["ProxProp", "Foof"])
def test_two_dimensional_meshes_are_left_alone(cases: list[dict[str, Any]], name: str) -> None:
    for rank in cases:
        said = rank["refused"][f"{name}: two dimensions"]
        assert "AttachError" in said
        assert "'0': fully_shard keeps its weight on a mesh of several dimensions (HSDP)" in said


def test_gradients_that_pass_by_the_rule_are_refused(cases: list[dict[str, Any]]) -> None:
    for rank in cases:
        assert "UncapturedLayerError: The weight " in rank["refused"]["forward before attach"]
        assert "sends other values down than gradients, so '1.weight'" in rank["refused"]["altered"]
