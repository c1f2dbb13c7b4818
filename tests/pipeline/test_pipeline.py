"""Real processes: a run over several stages is the one-process run, bit for bit; what a pipeline refuses."""

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from plywise.local import checkpoint
from plywise.pipeline.pipeline import Pipeline
from processes import CONTEXT, DEADLINE

from . import jobs
from .crew import Crew
from .learners import alone, batches, difference, make, states
from .starting import enter

pytestmark = pytest.mark.slow

KINDS = (
    "associated",
    "associated, Foof",
    "local",
    "local, ProxProp",
    "local, images",
    "local, carried",
    "cascaded",
    "next token, tied",
    "forward-forward",
)
CUTS = ([0, 3], [0, 1, 4], [0, 1, 2, 4])
COUNT = 7


@cache
def reference(kind: str, count: int = COUNT, last: int = 5) -> dict[str, Any]:
    """The states after ``count`` batches in this process."""
    return states(alone(kind, batches(kind, count, last=last)).trainers)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: state for part in parts for name, state in part["states"].items()}


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_any_number_of_stages_ends_in_the_states_of_one_process(
    crew: Crew, kind: str, cuts: list[int]
) -> None:
    """Weights, buffers, optimizers, schedulers and memories, with dropout and an odd last batch."""
    seen = crew.run(len(cuts), jobs.train, kind, cuts, [COUNT])
    assert difference(joined(seen), reference(kind)) == ""
    for part in seen:
        assert part["steps"] == [COUNT]
        assert part["heard"] == list(range(1, COUNT + 1))


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_interlocking_stages_end_in_the_states_of_one_process(
    crew: Crew, horizon: int, cuts: list[int]
) -> None:
    """Gradients cross one cut or several; a horizon of all five blocks is backpropagation."""
    kind = f"interlocking {horizon}"
    seen = crew.run(len(cuts), jobs.train, kind, cuts, [3, 0, COUNT - 3])
    assert difference(joined(seen), reference(kind)) == ""


@pytest.mark.parametrize("kind", ["interlocking 2 images", "interlocking 3 Foof"])
def test_interlocking_images_and_rules(crew: Crew, kind: str) -> None:
    seen = crew.run(3, jobs.train, kind, [0, 1, 4], [COUNT])
    assert difference(joined(seen), reference(kind)) == ""


def test_interlocking_horizons_differ() -> None:
    """Were no gradient to cross a cut, the test above would see it."""
    assert difference(reference("interlocking 2"), reference("interlocking 1")) != ""
    assert difference(reference("interlocking 3"), reference("interlocking 2")) != ""


def test_the_reference_depends_on_the_last_batch() -> None:
    """Were a batch lost at the end of a run, the test above would see it."""
    shorter = states(alone("local", batches("local", COUNT)[:-1]).trainers)
    assert difference(shorter, reference("local")) != ""


def test_default_cuts_are_even(crew: Crew) -> None:
    seen = crew.run(3, jobs.train, "local", None, [COUNT])
    assert [list(part["states"]) for part in seen] == [
        ["component 0"],
        ["component 1", "component 2"],
        ["component 3", "component 4"],
    ]
    assert difference(joined(seen), reference("local")) == ""


def test_one_stage_is_one_process(crew: Crew) -> None:
    seen = crew.run(1, jobs.train, "associated", None, [COUNT])
    assert difference(joined(seen), reference("associated")) == ""


@pytest.mark.parametrize("parts", [[2, 0, 4, 1], [0, 7], [7, 0, 0]], ids=str)
def test_runs_in_a_row_and_runs_without_batches(crew: Crew, parts: list[int]) -> None:
    seen = crew.run(3, jobs.train, "associated", [0, 1, 4], parts)
    assert difference(joined(seen), reference("associated")) == ""
    steps = [sum(parts[: number + 1]) for number in range(len(parts))]
    assert [part["steps"] for part in seen] == [steps] * 3


def test_nothing_but_empty_runs_changes_nothing(crew: Crew) -> None:
    seen = crew.run(3, jobs.train, "local", [0, 1, 4], [0, 0])
    assert difference(joined(seen), states(make("local").trainers)) == ""


@pytest.mark.parametrize("kind", ["associated", "local, images", "cascaded"])
def test_after_gather_every_process_predicts_as_one_does(crew: Crew, kind: str) -> None:
    """Twice: what a module remembers of an earlier prediction must go."""
    parts, learner, wanted = [3, 4], make(kind), []
    data = iter(batches(kind, COUNT))
    for part in parts:
        for _ in range(part):
            learner.step(*next(data))
        held = [trainer.component.state_dict() for trainer in learner.trainers]
        wanted.append((learner.predict(batches(kind, COUNT)[0][0]), copy.deepcopy(held)))
    assert difference(wanted[0], wanted[1]) != ""
    for found in crew.run(3, jobs.predict, kind, [0, 1, 4], parts):
        assert difference(found, wanted) == ""


# ---- replicas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["associated, plain", "local, plain"])
def test_two_stages_of_two_replicas(crew: Crew, tmp_path: Path, kind: str) -> None:
    count = 6
    rows = [[slice(0, 8)] * count, [slice(8, 16)] * count]
    first, second, third, fourth = crew.run(4, jobs.share, kind, rows, str(tmp_path))
    assert difference(first["states"], second["states"]) == ""
    assert difference(third["states"], fourth["states"]) == ""
    wanted = reference(kind, count, last=16)
    for name, state in joined([first, third]).items():
        for key, tensor in state["component"].items():
            one = wanted[name]["component"][key]
            assert (tensor - one).norm() <= 1e-6 * one.norm(), f"{name}/{key}"
    assert all(part["plain"] for part in (first, second, third, fourth))
    names = [f"component {index}" for index in range(5)]  # one of each in the checkpoint of four processes
    saved = checkpoint.load(tmp_path, count, names, [*names, "learner"])
    assert difference(saved, joined([first, third])) == ""


def test_replicas_with_different_shares_are_refused(crew: Crew, tmp_path: Path) -> None:
    odd = [[slice(0, 8), slice(0, 8)], [slice(8, 16), slice(8, 15)]]
    outcomes = crew.outcomes(4, jobs.share, "local, plain", odd, str(tmp_path))
    assert {outcome.raised for outcome in outcomes} == {"PipelineError"}
    assert "stage 0, replica 1 has a batch of 7, and other replicas have 7 to 8" in outcomes[1].value
    assert all("other replicas have 7 to 8" in outcome.value for outcome in outcomes)


def test_replicas_with_different_numbers_of_batches_are_refused(crew: Crew, tmp_path: Path) -> None:
    fewer = [[slice(0, 8)] * 3, [slice(8, 16)] * 2]
    outcomes = crew.outcomes(4, jobs.share, "local, plain", fewer, str(tmp_path))
    assert all("other replicas have 0 to 8" in outcome.value for outcome in outcomes)


def test_replicas_of_what_learns_in_closed_form_are_refused(crew: Crew, tmp_path: Path) -> None:
    rows = [[slice(0, 8)], [slice(8, 16)]]
    outcomes = crew.outcomes(4, jobs.share, "cascaded", rows, str(tmp_path))
    named = ["learns in closed form" in outcome.value for outcome in outcomes]
    assert sum(named) >= 2, outcomes  # the others may see first that these have gone
    others = {outcome.raised for outcome, says in zip(outcomes, named, strict=True) if not says}
    assert others <= {"PipelineError"}


def test_replicas_with_blocks_that_never_learn(crew: Crew, tmp_path: Path) -> None:
    count = 4
    rows = [[slice(0, 8)] * count, [slice(8, 16)] * count]
    first, second, _, _ = crew.run(4, jobs.share, "cascaded, gradient", rows, str(tmp_path))
    assert difference(first["states"], second["states"]) == ""


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_stages(crew: Crew, tmp_path: Path) -> None:
    folder, kind = str(tmp_path / "checkpoints"), "associated, Foof"
    crew.run(2, jobs.save, kind, [0, 3], folder, 0, 3, COUNT)
    crew.run(4, jobs.save, kind, [0, 1, 2, 4], folder, 3, 5, COUNT)
    crew.run(1, jobs.save, kind, None, folder, 5, 6, COUNT)
    crew.run(3, jobs.save, kind, [0, 1, 4], folder, 6, 7, COUNT)
    assert difference(read(Path(folder), 7), reference(kind)) == ""


def read(folder: Path, step: int) -> dict[str, Any]:
    names = [f"component {index}" for index in range(5)]
    states = checkpoint.load(folder, step, [*names, "learner"])
    assert states.pop("learner")["steps"] == step
    return states


def test_a_checkpoint_in_each_step_and_back_to_one_of_them(crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    parts = crew.run(3, jobs.save_every_step, "local", str(folder), COUNT, 3)
    assert difference({k: v for part in parts for k, v in part.items()}, reference("local")) == ""
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:09d}" for step in (5, 6, 7)]


def test_a_process_that_cannot_write_is_heard_by_all(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    folders = [str(tmp_path / "good"), str(tmp_path / "good"), str(tmp_path / "a file")]
    messages = crew.run(3, jobs.save_where_one_cannot, "local", folders)
    assert all("could not be written" in message for message in messages)
    assert "a file" in messages[2]
    assert list((tmp_path / "good").glob("step_*[0-9]")) == []


def test_a_checkpoint_of_another_learner(crew: Crew, tmp_path: Path) -> None:
    for message in crew.run(2, jobs.refuse_other_learner, str(tmp_path)):
        assert message == "The checkpoint is one of LocalLoss; this is AssociatedLearning."


def test_stages_that_restored_different_steps(crew: Crew, tmp_path: Path) -> None:
    outcomes = crew.outcomes(2, jobs.refuse_other_steps, str(tmp_path / "checkpoints"))
    for outcome in outcomes:
        assert outcome.raised == "PipelineError"
        assert "Batch 1 came where 2 was due" in outcome.value


# ---- the wire ------------------------------------------------------------------------------------


def test_nothing_that_comes_from_other_processes_is_unpickled(crew: Crew, tmp_path: Path) -> None:
    assert crew.run(3, jobs.unpickle, "local", str(tmp_path / "checkpoints")) == [[], [], []]
    heard = crew.run(2, jobs.unpickle_after_all)  # whereas torch's collectives of objects would be heard
    assert all(any("Path" in name for name in names) for names in heard)


def test_what_is_no_signal_is_refused(crew: Crew) -> None:
    first, second = crew.outcomes(2, jobs.send_noise)
    assert second.value == "What came from the stage before is not a message of a plywise pipeline."
    assert f"stage 1 (rank 1) failed: PipelineError: {second.value}" in first.value


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "what", "message"),
    [
        (2, {"cuts": [0, 1, 2]}, "makes 3 stages, and 2 processes were started for 2"),
        (3, {"cuts": [0, 3]}, "makes 2 stages, and 3 processes were started for 3"),
        (2, {"cuts": [1, 3]}, "rising from 0"),
        (3, {"cuts": [0, 3, 3]}, "rising from 0"),
        (3, {"cuts": [0, 3, 2]}, "rising from 0"),
        (2, {"cuts": [0, 5]}, "below 5"),
        (2, {"cuts": []}, "rising from 0"),
        (3, {"replicas": 2}, "3 processes do not make stages of 2 replicas"),
        (2, {"replicas": 0}, "0 replicas"),
        (2, {"timeout_s": 1.0}, "timeout_s must be"),
    ],
    ids=str,
)
def test_what_does_not_fit(crew: Crew, world: int, what: dict[str, Any], message: str) -> None:
    for outcome in crew.outcomes(world, jobs.refuse, what):
        assert outcome.raised == "PipelineError"
        assert message in outcome.value


def test_more_stages_than_components(crew: Crew) -> None:
    for outcome in crew.outcomes(4, jobs.refuse_stages):
        assert outcome.raised == "PipelineError"
        assert "4 stages are more than the 3 components" in outcome.value


def test_a_learner_whose_components_train_together(crew: Crew) -> None:
    for outcome in crew.outcomes(2, jobs.refuse_two_ways):
        assert outcome.raised == "PipelineError"
        assert "ActivationRelaxation trains its components together, not in stages" in outcome.error


def test_replicas_where_gradients_go_back(crew: Crew) -> None:
    for outcome in crew.outcomes(2, jobs.refuse_replicas):
        assert outcome.raised == "PipelineError"
        assert "Interlocking sends gradients from stage to stage" in outcome.error


def test_processes_with_different_cuts(crew: Crew) -> None:
    for outcome in crew.outcomes(2, jobs.refuse_different_cuts):
        assert outcome.raised == "PipelineError"
        assert "must make the same pipeline, but rank 1 has" in outcome.value.replace("All", "all")
        assert "[0, 1]" in outcome.value
        assert "[0, 2]" in outcome.value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(16, 16), (0, 0)], "at least one: 0 inputs, 0 targets"),
        ([(16, 16), (4, 3)], "4 inputs, 3 targets"),
        ([(8, 8), (16, 16)], "begin with the largest batch"),
    ],
    ids=["empty", "uneven", "larger than the first"],
)
def test_a_batch_that_does_not_fit_is_named_by_every_stage(
    crew: Crew, rows: list[tuple[int, int]], message: str
) -> None:
    first, second, third = crew.outcomes(3, jobs.refuse_batch, rows)
    for outcome in (first, second, third):
        assert message in outcome.value
    assert second.value.startswith("stage 1 stops: stage 0 (rank 0) failed: ")
    assert third.value.startswith("stage 2 stops: stage 0 (rank 0) failed: ")


def test_without_torchrun(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = CONTEXT.Process(target=enter, args=({}, str(log), None, jobs.refuse, {}))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 1
    assert "PipelineError: This process was not started by torchrun" in log.read_text()


def test_patience_leaves_time_before_the_promised_fifteen_seconds() -> None:
    assert inspect.signature(Pipeline).parameters["timeout_s"].default == 10.0
