"""Layer freezing in two processes: replicas freeze alike and stay equal, or it is refused with the reason."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import plywise as pw
from processes import run_two_ranks

from .runs import Run, run, same_bits

WRAPPERS = {
    "plain": {},
    "static": {"find_unused_parameters": True, "static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


def one_process(rank: int, folder: Path) -> None:
    """Train in every wrapper, each rank on its own data; leave what this rank saw in ``folder/rank.pt``."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)
    results: dict[str, Any] = {}
    for name, settings in WRAPPERS.items():
        for rule in (None, pw.ProxProp(), pw.RLS()):
            results[f"{name} {type(rule).__name__}"] = one_training(rank, settings, rule)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_training(rank: int, settings: dict[str, bool], rule: pw.Rule | None) -> dict[str, Any]:
    training = run(seed=rank)
    schedule = pw.LayerFreezing(every=2, warmup=1, threshold=0.2, max_share=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # unused parameters and a static graph: torch mends that
        wrapped = Run(DistributedDataParallel(training.model, **settings), training.optimizer)
    if rule is not None:
        rule.attach(training.model, training.optimizer)
    schedule.attach(wrapped.model, wrapped.optimizer)
    history = []
    try:
        for number in range(30):
            wrapped.step(1000 * rank + number % 2)
            parameters = {name: p.detach().clone() for name, p in training.model.named_parameters()}
            history.append((schedule.frozen, parameters))
    except pw.AttachError as error:
        return {"refused": str(error)}
    schedule.detach()
    before = training.weights()
    wrapped.step(1000 * rank)
    return {"history": history, "before": before, "thawed": training.weights()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What two processes saw."""
    return run_two_ranks(one_process, tmp_path_factory.mktemp("freezing"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["NoneType", "ProxProp", "RLS"])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_two_processes(ranks, wrapper, rule):
    one, two = (seen[f"{wrapper} {rule}"] for seen in ranks)
    if wrapper in ("plain", "static"):
        assert "find_unused_parameters=True" in one["refused"]
        assert one == two
        return
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine[0] == theirs[0]
        assert same_bits(mine[1], theirs[1])
    for (frozen, before), (_, after) in zip(one["history"], one["history"][1:], strict=False):
        for layer in "013468":
            assert same_bits(before, after, f"{layer}.") == (layer in frozen)
    assert len(one["history"][-1][0]) > 0
    for layer in "013468":
        assert not same_bits(one["before"], one["thawed"], f"{layer}.")
    trained = [name for name in one["thawed"] if name in one["history"][0][1]]
    assert all(torch.equal(one["thawed"][name], two["thawed"][name]) for name in trained)
