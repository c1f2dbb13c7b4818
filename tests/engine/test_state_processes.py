"""Statistics under several processes: saved, loaded by another number, sharded, found at different times."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from state_runs import OPTIMIZERS, RULES, Run, Stacked
from state_worker import FORMS, SAVED, STEPS, USED, ZERO, Experts, load_distributed, main, save_distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions

from plywise.testing.contract.memories import list_layers
from plywise.testing.contract.models import assert_close, have_same_bits
from processes import run_two_ranks

pytestmark = pytest.mark.slow
Seen = dict[str, Any]
LAST = range(SAVED, STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process has saved, in two ways."""
    folder = tmp_path_factory.mktemp("state")
    for rule in {rule for rule, _ in FORMS.values()}:
        run = Run(RULES[rule](), OPTIMIZERS["momentum"]).steps(*range(SAVED))
        save_distributed(run.model, run.optimizer, folder / f"one {rule}", StateDictOptions())
        torch.save((run.model.state_dict(), run.optimizer.state_dict()), folder / f"one {rule}.pt")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Seen]:
    """What the two processes saw."""
    return run_two_ranks(main, folder)


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_go_on_from_two(form: str, ranks: list[Seen]) -> None:
    for seen in ranks:
        assert have_same_bits(seen[form]["resumed"], seen[form]["unbroken"])
        assert have_same_bits(seen[form]["unbroken"], ranks[0][form]["unbroken"])


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_go_on_from_one(form: str, ranks: list[Seen]) -> None:
    # another number of processes rounds otherwise; the ways of loading differ in no bit
    for seen in ranks:
        assert have_same_bits(seen[form]["one, distributed"], seen[form]["one, plain"])
    if form == "back-matching":
        return  # each process draws a random vector of its own
    run = Run(RULES[FORMS[form][0]](), OPTIMIZERS["momentum"]).steps(*range(STEPS))
    assert_close(tensors_of(ranks[0][form]["one, plain"]), tensors_of(run.copy_state()), 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_one_process_goes_on_from_two(form: str, ranks: list[Seen], folder: Path) -> None:
    rule, options = FORMS[form]
    runs = [Run(RULES[rule](), OPTIMIZERS["momentum"], seed=9) for _ in range(2)]
    runs[0].compute_loss(0)
    load_distributed(runs[0].model, runs[0].optimizer, folder / f"two {form}", options)
    model, optimizer = torch.load(folder / f"two {form}.pt", weights_only=True)
    runs[1].model.load_state_dict(model)
    runs[1].optimizer.load_state_dict(optimizer)
    for run in runs:
        run.steps(*LAST)
    assert have_same_bits(runs[0].copy_state(), runs[1].copy_state())
    if form == "back-matching":
        return
    assert_close(tensors_of(runs[0].copy_state()), tensors_of(ranks[0][form]["unbroken"]), 1e-3)


def test_one_process_may_ask_for_a_checkpoint(ranks: list[Seen]) -> None:
    one, two = (seen["asked"] for seen in ranks)
    assert have_same_bits(one, two)
    assert int(one["Foof/step"]) == 3


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZERO)
def test_sharded_optimizers_go_on(name: str, ranks: list[Seen]) -> None:
    one, two = (seen["zero"][name] for seen in ranks)
    for seen in (one, two):
        assert have_same_bits(ours(seen["unbroken"]), ours(one["unbroken"]))
        assert have_same_bits(ours(seen["resumed"]), ours(one["unbroken"]))
        assert have_same_bits(ours(seen["whole"]), ours(one["unbroken"]))
    again = {key: value for key, value in two["saved again"].items() if "plywise.Foof" in key}
    assert sum(key.endswith("input") for key in again) == len(list_layers(ours(one["unbroken"]))) > 7


@pytest.mark.parametrize("name", ZERO)
def test_what_a_sharded_optimizer_saved_goes_on_without_shards(
    name: str, ranks: list[Seen], folder: Path
) -> None:
    model, state = torch.load(folder / f"zero {name}.pt", weights_only=True)
    ends = []
    for first in (True, False):  # the rule attached first, or the state loaded first
        run = Run(RULES["foof"](), OPTIMIZERS[name], seed=9, attach=first)
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(copy.deepcopy(state))
        if not first:
            run.attach()
        ends.append(run.steps(*LAST).copy_state())
    assert have_same_bits(*ends)
    unbroken = ranks[0]["zero"][name]["unbroken"]
    # the gradient of attention.in_proj_bias is rounding in part, which Adam makes a step of
    weights = {key: ends[0][key] for key in model if key != "attention.in_proj_bias"}
    assert_close(weights, {key: unbroken[key] for key in weights}, 1e-3)


def test_what_cannot_be_right_is_refused(ranks: list[Seen]) -> None:
    for said in (seen["refused"] for seen in ranks):
        assert "overlap_with_ddp=True" in said["overlap"]
        assert "ZeroRedundancyOptimizer does not save them" in said["measured values"]
        assert "throws away the state of other processes' parameters" in said["saved without shards"]


def ours(seen: Seen) -> Seen:
    """Weights and statistics; of the optimizer's own state a process has a part."""
    return {name: value for name, value in seen.items() if not name.split("/")[0].isdigit()}


def tensors_of(seen: Seen) -> Seen:
    return {name: value for name, value in seen.items() if value.is_floating_point()}


# ---- layers that are found at different times ------------------------------------------------------------


def test_experts_that_processes_find_at_different_times(ranks: list[Seen]) -> None:
    one, two = (seen["experts"] for seen in ranks)
    for number in range(len(USED)):
        assert have_same_bits(one[str(number)], two[str(number)]), number
    assert list_layers(one["3"]) >= {"trunk", "head", "experts.2"}  # torch says beforehand what these are
    assert list_layers(one[str(len(USED) - 1)]) == {"trunk", "head", "experts.0", "experts.1", "experts.2"}
    for seen in (one, two):
        assert have_same_bits(seen["resumed"], seen[str(len(USED) - 1)])
    for name, value in Experts().state_dict().items():
        assert not torch.equal(value, one["resumed"][name]), name


def test_parts_called_in_another_order_on_each_process(ranks: list[Seen]) -> None:
    one, two = (seen["parts"] for seen in ranks)
    assert have_same_bits(one, two)
    assert {"weight[0:6]", "weight[6:12]"} <= list_layers(one)
    run = Run(RULES["adabk"](), OPTIMIZERS["momentum"], model=Stacked().double()).steps(*range(STEPS))
    assert_close(tensors_of(one), tensors_of(run.copy_state()), 1e-6)


def test_a_process_without_rows(ranks: list[Seen]) -> None:
    one, two = (seen["empty"] for seen in ranks)
    assert have_same_bits(one, two)
    assert int(one["Foof/step"]) == STEPS
