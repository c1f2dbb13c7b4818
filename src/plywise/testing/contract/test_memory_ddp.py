"""Two real processes with half of each batch: together they are one process with all of it."""

import pickle
import re
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plywise import Rule
from plywise.testing.cases import Case
from plywise.testing.contract.memories import Run, flatten_memory, list_layers, start
from plywise.testing.contract.memory_ddp_worker import (
    DEEP,
    SAVED,
    STEPS,
    TRACES,
    main,
    run_branched,
    run_script,
    run_shared_out,
    stack_steps,
    take_half,
)
from plywise.testing.contract.models import are_finite, assert_close, have_same_bits
from plywise.testing.processes import run_two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.sends_rule]
TOLERANCE = 1e-6

Seen = dict[str, Tensor]


def select_rules_with_memory(cases: list[Case]) -> dict[str, Rule]:
    made = {case.name: case.make() for case in cases}
    return {name: rule for name, rule in made.items() if rule.remembers}


@pytest.fixture(scope="module")
def ranks(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw; one pair of processes runs all rules."""
    return run_two_ranks(main, tmp_path_factory.mktemp("memory-ddp"), select_rules_with_memory(cases))


@pytest.fixture
def pair(memory_case: Case, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the two processes saw of one rule."""
    return [seen[memory_case.name] for seen in ranks]


def start_whole(case: Case, kind: str, seed: int = 1) -> Run:
    run = start(case, kind, seed, torch.float64)
    run.model.eval()
    return run


@pytest.fixture(scope="module")
def run_whole() -> Callable[[Case, str], Seen]:
    """Runs in one process, and copies the state after each step; once for all tests."""
    return cache(lambda case, kind: stack_steps(start_whole(case, kind).record(range(STEPS))))


def take_last(seen: Seen) -> Seen:
    return {name: values[-1] for name, values in seen.items()}


def assert_same_run(one: Seen, two: Seen, expected: Seen) -> None:
    """Assert that both replicas have the same states, and one process nearly the same."""
    assert have_same_bits(one, two)
    assert are_finite(one)
    assert_close(one, expected, TOLERANCE)


# ---- every rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "way"), TRACES)
def test_two_halves_are_one_whole(
    memory_case: Case, pair: list[dict[str, Any]], run_whole: Callable[[Case, str], Seen], kind: str, way: str
) -> None:
    one, two = (seen["traces"][f"{kind} {way}"] for seen in pair)
    assert_same_run(one, two, run_whole(memory_case, kind))


def test_gradients_averaged_by_hand_are_those_of_ddp(pair: list[dict[str, Any]]) -> None:
    for seen in pair:
        assert_close(seen["traces"]["mlp process_group"], seen["traces"]["mlp attach, wrap"], 1e-12)


def test_either_process_goes_on_from_what_the_other_saved(pair: list[dict[str, Any]]) -> None:
    for seen in pair:
        assert have_same_bits(seen["resumed"]["end"], take_last(seen["traces"]["mixed attach, wrap"]))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_goes_on_from_what_either_saved(
    memory_case: Case, pair: list[dict[str, Any]], rank: int
) -> None:
    run, seen = start_whole(memory_case, "mixed", seed=100), pair[rank]["resumed"]
    run.load(seen["saved"])
    assert_close(run.record(range(SAVED, STEPS))[-1], seen["end"], TOLERANCE)


def test_micro_batches_without_sync(
    memory_case: Case, pair: list[dict[str, Any]], run_whole: Callable[[Case, str], Seen]
) -> None:
    one, two = (seen["micro-batches"] for seen in pair)
    assert_same_run(one, two, run_whole(memory_case, "mixed"))


def test_a_layer_that_rests_on_one_process(memory_case: Case, pair: list[dict[str, Any]]) -> None:
    one, two = (seen["branched"] for seen in pair)
    assert_same_run(one, two, run_branched(memory_case.make(), whole=True))


def test_nan_on_one_process_is_skipped_by_both(
    memory_case: Case, pair: list[dict[str, Any]], run_whole: Callable[[Case, str], Seen]
) -> None:
    one, two = (seen["poisoned"] for seen in pair)
    for seen in (one, two):
        assert seen["skipped"] == 1
        assert have_same_bits(seen["after"], seen["before"])
    undisturbed = take_last(run_whole(memory_case, "mlp"))
    assert_same_run(one["end"], two["end"], undisturbed)


@pytest.mark.parametrize("how", ["alone", "a group of its own"])
def test_each_process_for_itself(memory_case: Case, pair: list[dict[str, Any]], how: str) -> None:
    for rank, seen in enumerate(process[how] for process in pair):
        if how == "alone":
            ((category, message),) = seen["warnings"]  # once
            assert category == "RuntimeWarning"
            assert re.search(
                r"2 processes run.*no DistributedDataParallel.*attach\(.*process_group=", message
            )
        else:
            assert not seen["warnings"]
        run = start_whole(memory_case, "mlp")
        for number in range(STEPS):
            run.step_on(take_half(run.make_data(number), rank))
        assert_close(seen["end"], run.copy_state(), 1e-12)


# ---- once -------------------------------------------------------------------------------------------


def test_the_work_is_shared_out(ranks: list[dict[str, Any]]) -> None:
    one, two = (seen["shared out"] for seen in ranks)
    expected = run_shared_out(whole=True)
    assert_same_run(one["seen"], two["seen"], expected["seen"])
    for mine, its, all_of_it in zip(*(x["refreshed"] for x in (one, two, expected)), strict=True):
        assert sorted(mine + its) == all_of_it  # none left out, none done twice
        assert len(mine) == len(its) == len(all_of_it) / 2
    # at first each layer in each step, then half of them
    assert [len(names) for names in expected["refreshed"]] == [DEEP] * 2 + [DEEP // 2] * (STEPS - 2)


# ---- a script, as torchrun would start it ---------------------------------------------------------------

SCRIPT = """
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

folder = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
rank, found = dist.get_rank(), {}
for name, rule in pickle.loads((folder / "rules").read_bytes()).items():
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rule.attach(model, optimizer)
    net = DistributedDataParallel(model)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(2, 6)), torch.randint(3, (2,)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    found[name] = {"losses": losses, "model": model.state_dict(), "state": state}
torch.save(found, folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def script_ranks(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes of a script saw; one run for all rules."""
    folder: Path = tmp_path_factory.mktemp("script")
    (folder / "rules").write_bytes(pickle.dumps(select_rules_with_memory(cases)))
    (folder / "train.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return run_two_ranks(run_script, folder, port)


def test_a_script_for_torchrun(memory_case: Case, script_ranks: list[dict[str, Any]]) -> None:
    one, two = (seen[memory_case.name] for seen in script_ranks)
    assert one["losses"] != two["losses"]  # each had rows of its own
    assert have_same_bits(one["model"], two["model"])
    assert have_same_bits(flatten_memory(one["state"]), flatten_memory(two["state"]))
    assert are_finite(one["model"])
    found = flatten_memory(one["state"])
    assert list_layers(found) == {"0", "2", "4"}
    assert [int(value) for name, value in found.items() if name.endswith("/step")] == [5]
