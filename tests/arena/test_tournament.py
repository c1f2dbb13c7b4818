"""A bench has equal tuning and fresh seeds, and every failure of a trial is an outcome."""

import json
import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from plywise.arena.methods import find_method
from plywise.arena.run.bench import Bench, make_experiment
from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import InlineExecutor, ProcessExecutor
from plywise.arena.run.experiment import TUNING_SEED
from plywise.arena.run.ledger import Ledger, read
from plywise.arena.scoring.records import FINAL, TUNING
from plywise.arena.scoring.score import choose_best
from plywise.arena.space import draw_points
from plywise.data.parts import Data
from plywise.errors import PlywiseError, StateError

HERE = "competitors"
OWN = WorkloadSpec("own", f"{HERE}:model", f"{HERE}:data", steps=12, batch_size=32)


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


@pytest.fixture
def resolve():
    with ExitStack() as stack:

        def _resolve(methods, spec=OWN, **more):
            config = BenchConfig((spec,), tuple(methods), **{"trials": 2, "seeds": 2, **more})
            return stack.enter_context(resolve_bench(config))

        yield _resolve


def bench(folder, resolve, methods, **more):
    return Bench(resolve(methods, **more), folder)


def run(folder, resolve, methods, executor=None, **more):
    made = bench(folder, resolve, methods, **more)
    return made, [piece.line for piece in made.run(executor or ProcessExecutor(2))]


def drop_clocks(lines):
    """Remove the values that depend on the order and speed of the runs."""
    clocks = ("cpu", "wall", "measuring", "peak_mib", "finished")
    kept = [{name: value for name, value in line.items() if name not in clocks} for line in lines]
    return sorted(kept, key=lambda line: json.dumps(line, sort_keys=True))


def test_every_method_gets_the_same_trials_and_fresh_seeds(tmp_path, resolve):
    made, lines = run(tmp_path, resolve, ["sgd", "adamw"])
    assert made.unfinished() == []
    assert len(lines) == made.total == 2 * (2 + 2 + 2)
    for name in ("sgd", "adamw"):
        own = [line for line in lines if line["method"] == name]
        tuning = [line for line in own if line["purpose"] == TUNING]
        assert [line["numbers"] for line in sorted(tuning, key=lambda one: one["trial"])] == draw_points(
            find_method(name).space, 2
        )
        assert {line["seed"] for line in tuning} == {TUNING_SEED}
        assert all(line["test"] is None for line in tuning), "the test set is for final runs"
        for track, numbers in (
            ("defaults", {n: r.default for n, r in find_method(name).space.items()}),
            ("tuned", choose_best(tuning, made.experiment.target("own"))["numbers"]),
        ):
            final = [line for line in own if line["purpose"] == FINAL and line["track"] == track]
            assert sorted(line["seed"] for line in final) == [0, 1]
            assert all(line["numbers"] == numbers and line["test"] is not None for line in final)


def test_one_worker_or_three_give_the_same_numbers(tmp_path, resolve):
    _, one = run(tmp_path / "one", resolve, ["sgd", "proxprop", "local-loss"], ProcessExecutor(1))
    _, three = run(tmp_path / "three", resolve, ["sgd", "proxprop", "local-loss"], ProcessExecutor(3))
    assert drop_clocks(one) == drop_clocks(three)


def test_in_this_process_as_in_others(tmp_path, resolve):
    methods = ["sgd", "proxprop", f"{HERE}:Exploding"]
    _, apart = run(tmp_path / "apart", resolve, methods)
    made, here = run(tmp_path / "here", resolve, methods, InlineExecutor())
    summary = made.summarize()
    assert drop_clocks(here) == drop_clocks(apart)
    assert {row.method for row in summary.rows} == set(methods)
    assert any("trials failed" in sentence for sentence in summary.conclusions)
    again, rest = run(tmp_path / "here", resolve, methods, InlineExecutor())
    assert rest == []
    assert again.summarize().lines == summary.lines


def test_the_null_control_repeats_its_original_with_other_seeds(tmp_path, resolve):
    made, lines = run(tmp_path, resolve, ["sgd", "sgd-again"])
    assert made.about["methods"]["sgd-again"]["null"] == "sgd"
    seeds = {
        name: {line["seed"] for line in lines if line["method"] == name} for name in made.resolved.methods
    }
    assert not seeds["sgd"] & seeds["sgd-again"]
    assert len(lines) == made.total


def test_trials_in_the_ledger_do_not_run_again(tmp_path, resolve):
    first = bench(tmp_path, resolve, ["sgd", "adamw"])
    pieces = first.run(ProcessExecutor(2))
    kept = [next(pieces).line for _ in range(5)]
    pieces.close()
    assert list(read(tmp_path / "trials.jsonl")) == kept
    second, rest = run(tmp_path, resolve, ["sgd", "adamw"])
    assert len(rest) == second.total - 5
    _, unbroken = run(tmp_path / "other", resolve, ["sgd", "adamw"])
    assert drop_clocks(kept + rest) == drop_clocks(unbroken)
    assert list(second.run(ProcessExecutor(1))) == [], "a finished bench has nothing to do"


def test_a_test_part_that_was_trained_on_is_noted(tmp_path, resolve):
    made = bench(tmp_path / "leaking", resolve, ["sgd"], spec=replace(OWN, data=f"{HERE}:leaking_data"))
    noted = json.loads((tmp_path / "leaking" / "bench.json").read_text())["workloads"]["own"]["repeated"]
    assert noted == {"validation": 0, "test": 20} == made.about["workloads"]["own"]["repeated"]
    assert bench(tmp_path / "own", resolve, ["sgd"]).about["workloads"]["own"]["repeated"]["test"] == 0


def test_a_running_bench_is_not_disturbed_by_another(tmp_path, resolve):
    pieces = bench(tmp_path, resolve, ["sgd"]).run(ProcessExecutor(1))
    next(pieces)
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(PlywiseError, match="Another process is adding trials"):
        bench(tmp_path, resolve, ["sgd"])
    assert (tmp_path / "bench.json").read_bytes() == before
    pieces.close()


def test_resuming_on_another_machine_is_noted(tmp_path, resolve):
    made, _ = run(tmp_path, resolve, ["sgd"])
    path = tmp_path / "bench.json"
    about = json.loads(path.read_text())
    assert "resumed" not in about
    about["environment"]["cpu"] = "another one"
    del about["plan"]["threads"], about["plan"]["timeout_s"], about["check"]  # as before they were kept
    path.write_text(json.dumps(about))
    run(tmp_path, resolve, ["sgd"])
    assert "resumed" not in json.loads(path.read_text()), "there was nothing left to run"
    kept = made.ledger.path.read_text().splitlines(keepends=True)
    for left in (1, 2):
        made.ledger.path.write_text("".join(kept[:-left]))
        run(tmp_path, resolve, ["sgd"])
        after = json.loads(path.read_text())
        assert [one["cpu"] for one in after["resumed"]] == [made.about["environment"]["cpu"]]


def test_a_trial_makes_the_users_network_once(resolve, monkeypatch):
    import competitors

    resolved = resolve(["sgd"]).workloads["own"]
    first = resolved.workload
    made = []
    monkeypatch.setattr(
        competitors, "model", lambda model=competitors.model: made.append(model()) or made[-1]
    )
    again = resolved.source.load(Data.load(resolved.file))
    assert made == []
    for name in ("name", "task", "batch_size", "steps", "blocks", "classes"):
        assert getattr(again, name) == getattr(first, name), name
    assert first.classes == 3
    assert again.make_model() is made[0]


def test_local_learners_are_measured_like_the_others(resolve):
    experiment = make_experiment(resolve(["sgd", "local-loss"]), Ledger())
    assert experiment.probe(ProcessExecutor(2)) == {}
    assert all(cost.step > 0 for cost in experiment.costs.values())
    assert experiment.done == 0


def test_a_spent_budget_leaves_a_bench_that_can_go_on(tmp_path, resolve):
    made = bench(tmp_path, resolve, ["sgd", "adamw"])
    left = iter([True] * 3)
    assert len(list(made.run(ProcessExecutor(1), lambda: next(left, False)))) == 3
    assert "own" in json.loads((tmp_path / "bench.json").read_text())["unfinished"][0]
    _, rest = run(tmp_path, resolve, ["sgd", "adamw"])
    assert len(rest) == made.total - 3
    assert json.loads((tmp_path / "bench.json").read_text())["unfinished"] == []


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("Exploding", "diverged at step"),
        ("Killed", "its process was lost (killed by SIGKILL)"),
        ("Leaving", "its process was lost (exit code 3)"),
        ("Hanging", "took longer than 8 s"),
    ],
)
def test_a_method_that_fails_is_an_outcome_and_harms_no_other(tmp_path, resolve, method, why):
    executor = ProcessExecutor(3, timeout_s=8.0 if method == "Hanging" else 120.0)
    made, lines = run(tmp_path, resolve, [f"{HERE}:{method}", "sgd"], executor, trials=1, seeds=1)
    bad = [line for line in lines if line["method"] != "sgd"]
    assert [why in line["failure"] for line in bad] == [True] * 3
    assert all(line["failure"] is None for line in lines if line["method"] == "sgd")
    assert len(lines) == made.total


def test_a_worker_killed_from_outside_is_named(tmp_path, resolve):
    def kill():
        import multiprocessing

        end = time.monotonic() + 60
        while time.monotonic() < end:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    _, lines = run(tmp_path, resolve, [f"{HERE}:Slow"], trials=1, seeds=2)
    killer.join()
    assert [line["failure"] for line in lines if line["failure"]] == [
        "its process was lost (killed by SIGKILL)"
    ]
    assert len(lines) == 5


def test_an_optimizer_and_a_method_of_ones_own(tmp_path, resolve):
    made, lines = run(tmp_path, resolve, [f"{HERE}:Adamlike", f"{HERE}:fixed"])
    assert all(line["failure"] is None for line in lines)
    assert sum(line["method"] == f"{HERE}:fixed" for line in lines) == 2, "nothing to tune: the defaults only"
    assert len(lines) == made.total == 8


def test_a_local_learner_needs_classes(tmp_path, resolve):
    spec = WorkloadSpec("concrete-like", f"{HERE}:model", f"{HERE}:data", blocks=0, steps=12)
    mixed, lines = run(tmp_path, resolve, ["sgd", "local-loss"], spec=spec, trials=1, seeds=1)
    assert [one["method"] for one in mixed.about["refused"]] == ["local-loss"]
    assert {line["method"] for line in lines} == {"sgd"}
    with pytest.raises(PlywiseError, match="No method can run: local-loss"):
        resolve(["local-loss"], spec=spec)


def test_another_bench_in_the_folder_is_refused(tmp_path, resolve):
    bench(tmp_path, resolve, ["sgd"])
    with pytest.raises(StateError, match="methods are sgd, not adamw"):
        bench(tmp_path, resolve, ["adamw"])
    with pytest.raises(StateError, match="trials are 2, not 3"):
        bench(tmp_path, resolve, ["sgd"], trials=3)
    with pytest.raises(StateError, match="timeout_s are None, not 5"):
        bench(tmp_path, resolve, ["sgd"], timeout_s=5.0)
    about = json.loads((tmp_path / "bench.json").read_text())
    about["workloads"]["own"]["data"] = "others"
    (tmp_path / "bench.json").write_text(json.dumps(about))
    with pytest.raises(StateError, match=r"or damaged .*it does not fit its check"):
        bench(tmp_path, resolve, ["sgd"])
    del about["check"]
    (tmp_path / "bench.json").write_text(json.dumps(about))
    with pytest.raises(StateError, match="own has changed since"):
        bench(tmp_path, resolve, ["sgd"])
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(StateError, match="not a description of a bench"):
        bench(tmp_path, resolve, ["sgd"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (((), ("sgd",)), "a workload and a method"),
        (((OWN,), ()), "a workload and a method"),
        (((OWN,), ("sgd", "sgd")), "'sgd' is given twice"),
        (((OWN, OWN), ("sgd",)), "'own' is given twice"),
        (((OWN,), ("sgd",), -1), "at least 0"),
        (((OWN,), ("sgd",), 1, 0), "at least 1"),
    ],
)
def test_plans_that_make_no_sense(plan, message):
    with pytest.raises(PlywiseError, match=message):
        BenchConfig(*plan)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"threads": 0}])
def test_no_workers(wrong):
    with pytest.raises(PlywiseError, match="at least 1"):
        ProcessExecutor(**wrong)


def test_a_model_that_cannot_be_made_is_reported_before_anything_runs(resolve):
    with pytest.raises(PlywiseError, match="no such layer"):
        resolve(["sgd"], spec=WorkloadSpec("own", f"{HERE}:broken_model", f"{HERE}:data"))
