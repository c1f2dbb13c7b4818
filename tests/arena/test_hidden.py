"""Hidden workloads depend on their seed only, are the same everywhere, and can be learned."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from plywise.arena.method import TrialContext
from plywise.arena.methods import find_method
from plywise.arena.methods.learners import cut
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.trial import run_trial
from plywise.arena.scoring.records import FINAL
from plywise.arena.space import get_defaults
from plywise.arena.workloads import HIDDEN, WORKLOADS, find_workload, list_workloads
from plywise.arena.workloads.hidden import KINDS, OPERATIONS, make_workload
from plywise.arena.workloads.synthetic import GRID
from plywise.errors import PlywiseError

SEEDS = (0, 7, 91, 123_456)
CLASSIFYING = ("classes", "groups", "pairs")


def parts_of(workload):
    return list(vars(workload.make_data()).values())


def test_their_kinds_are_the_listed_ones_and_none_is_an_ordinary_workload():
    assert tuple(KINDS) == HIDDEN
    assert not [name for name in WORKLOADS if name.startswith("hidden")]
    assert list_workloads("hidden", 3) == [f"hidden-{kind}-3" for kind in HIDDEN]


def test_without_a_seed_each_call_draws_one():
    drawn = {tuple(list_workloads("hidden")) for _ in range(5)}
    assert len(drawn) > 1
    assert all(find_workload(names[0]).name == names[0] for names in drawn)


@pytest.mark.parametrize(
    ("words", "seed", "message"),
    [("hidden", -1, "0 or more, not -1"), ("quick", 3, "belongs to the workloads called hidden")],
)
def test_an_invalid_or_unneeded_seed_is_refused(words, seed, message):
    with pytest.raises(PlywiseError, match=message):
        list_workloads(words, seed)


@pytest.mark.parametrize("name", ["hidden", "hidden-teacher", "hidden-teachers-7", "hidden-teacher--7"])
def test_a_name_without_its_seed_is_no_workload(name):
    with pytest.raises(PlywiseError, match="hidden-teacher-7 and others"):
        find_workload(name)


def test_another_process_makes_the_same_data_and_networks():
    names = list_workloads("hidden", SEEDS[1])
    code = (
        "from plywise.arena.workloads import find_workload\n"
        f"for found in map(find_workload, {names!r}):\n"
        "    print(found.make_data().fingerprint(), found.steps, found.batch_size, found.make_model())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.manual_seed(5)  # the caller's random numbers change nothing
    mine = []
    for kind, workload in zip(HIDDEN, map(find_workload, names), strict=True):
        data = KINDS[kind][1].__wrapped__(SEEDS[1])  # made again, not taken from a cache
        mine.append(f"{data.fingerprint()} {workload.steps} {workload.batch_size} {workload.make_model()}")
    assert done.stdout == "\n".join([*mine, ""])


@pytest.mark.parametrize("kind", HIDDEN)
def test_other_seeds_make_other_workloads(kind):
    found = [make_workload(kind, seed) for seed in SEEDS]
    assert len({one.make_data().fingerprint() for one in found}) == len(SEEDS)
    assert len({(one.steps, one.batch_size, str(one.make_model())) for one in found}) > 1
    assert [one.target for one in found] == [None] * len(SEEDS), "it comes from the baselines of a bench"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", HIDDEN)
def test_parts_fit_the_network_and_share_no_sample(kind, seed):
    workload, parts = make_workload(kind, seed), parts_of(make_workload(kind, seed))
    assert workload.make_data().count_repeated() == {"validation": 0, "test": 0}
    assert [len(part.x) == len(part.y) > 250 for part in parts] == [True] * 3
    output = workload.make_model()(parts[0].x[:4])
    for part in parts:
        assert part.x.dtype == torch.float32
        assert torch.isfinite(part.x).all()
        if kind in CLASSIFYING:
            assert output.shape == (4, workload.classes)
            assert 0 <= part.y.min() <= part.y.max() < workload.classes
        else:
            assert output.shape == part.y[:4].shape
            assert torch.equal(part.y / GRID, (part.y / GRID).round())
    if kind in CLASSIFYING:
        assert len(cut(workload.make_model(), workload.blocks, parts[0].x[:4])) == workload.blocks
        most = parts[0].y.mode().values
        assert workload.task.chance == pytest.approx((parts[1].y != most).float().mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["teacher", "regression", "classes"])
def test_inputs_are_correlated_and_tables_hold_outliers(kind):
    for seed in SEEDS:
        x = parts_of(make_workload(kind, seed))[0].x
        correlation = torch.corrcoef(x.T) - torch.eye(x.shape[1])
        assert correlation.abs().max() > 0.3
        assert torch.allclose(x.mean(0), torch.zeros(()), atol=1e-3)
        assert torch.allclose(x.std(0), torch.ones(()), atol=1e-3)
        assert (x.abs().max() > 8) == (kind != "teacher"), "eight deviations"


def test_labels_of_digits_are_groups_and_operations():
    """A digit determines the group; the label of a pair is the result of one of the operations."""
    for seed in SEEDS:
        for part in parts_of(make_workload("groups", seed)):
            assert 2 <= len(part.y.unique()) <= 5
        labels = parts_of(make_workload("pairs", seed))[0].y
        assert len(labels.unique()) in (10, 19)
    one, other = torch.tensor([3, 9]), torch.tensor([5, 2])
    made = [operation(one, other).tolist() for operation in OPERATIONS.values()]
    assert made == [[8, 11], [2, 7], [5, 9]]


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_workloads_can_be_learned(kind):
    """AdamW at its defaults gets a quarter of the way from chance to zero, on one of two seeds."""
    method, share = find_method("adamw"), 1.0
    for seed in SEEDS[:2]:
        if share < 0.75:
            break
        workload = make_workload(kind, seed)
        data = workload.make_data()
        more = (workload.task, get_defaults(method.space), workload.steps, data.train.x[:8])
        record = run_trial(
            lambda more=more, workload=workload: method.make(TrialContext(workload.make_model(), *more)),
            data,
            workload.task,
            seed=0,
            steps=workload.steps,
            batch_size=workload.batch_size,
            measure_every=workload.interval,
        )
        assert record.failure is None
        share = min(record.validation) / workload.task.chance
    assert share < 0.75


def test_targets_come_from_the_baselines_of_the_bench():
    """The same code path as for a user's model."""
    methods = [find_method(name) for name in ("sgd", "adamw", "foof")]
    done = run_arms(replace(make_workload("regression", 7), steps=75), methods, Design(seeds=1, trials=2))
    best = sorted(
        min(line["validation"][:21])  # the first 80 % of 25 measurements, and the one before the first step
        for line in done.ledger.lines.values()
        if line["purpose"] != FINAL and line["method"] != "foof"
    )
    assert done.target("hidden-regression-7") == best[2]
