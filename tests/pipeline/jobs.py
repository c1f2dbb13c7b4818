"""What processes of a pipeline do in test_pipeline.py."""

import copy
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import plywise as pw
from plywise.pipeline.pipeline import Pipeline

from .learners import batches, difference, make, mlp, sgd, states

AUDIT: list[str] = []
"""Names that pickles have asked for while somebody listened."""
LISTENING: list[bool] = []


def train(kind: str, cuts: list[int] | None, parts: list[int]) -> dict[str, Any]:
    """Run on batches, so many in each call of `run`."""
    with Pipeline(make(kind), cuts=cuts) as pipeline:
        data, steps, heard = iter(batches(kind, sum(parts))), [], []
        for part in parts:
            feed = (next(data) for _ in range(part)) if pipeline.stage == 0 else None
            steps.append(pipeline.run(feed, after=heard.append))
        return {"states": states(pipeline.trainers), "steps": steps, "heard": heard}


def predict(kind: str, cuts: list[int] | None, parts: list[int]) -> list[tuple[Any, Any]]:
    """After each part of a run: what this process predicts, and the parameters and buffers it holds."""
    with Pipeline(make(kind), cuts=cuts) as pipeline:
        data, seen = batches(kind, sum(parts)), []
        for number, part in enumerate(parts):
            start = sum(parts[:number])
            pipeline.run(data[start : start + part])
            learner = pipeline.gather()
            held = [trainer.component.state_dict() for trainer in learner.trainers]
            seen.append((learner.predict(data[0][0]), copy.deepcopy(held)))
        return seen


def share(kind: str, rows: list[list[slice]], resume_in: str = "") -> dict[str, Any]:
    """Two replicas of each stage; replica r has ``rows[r][k]`` of batch k."""
    learner = make(kind)
    with Pipeline(learner, replicas=2, timeout_s=4.0) as pipeline:
        whole = batches(kind, len(rows[0]), last=16)
        own = rows[pipeline.replica]
        pipeline.run([(x[part], y[part]) for (x, y), part in zip(whole, own, strict=False)])
        pipeline.save(Path(resume_in))
    module_is_plain = all(trainer.module is trainer.component for trainer in learner.trainers)
    return {"states": states(pipeline.trainers), "plain": module_is_plain}


def save(kind: str, cuts: list[int] | None, folder: str, start: int, stop: int, count: int) -> None:
    """Batches ``start`` to ``stop`` of a run of ``count``, from the last checkpoint to the next one."""
    with Pipeline(make(kind), cuts=cuts) as pipeline:
        if start:
            assert pipeline.restore(Path(folder)) == start
        pipeline.run(batches(kind, count)[start:stop])
        pipeline.save(Path(folder))


def save_every_step(kind: str, folder: str, count: int, keep: int) -> dict[str, Any]:
    with Pipeline(make(kind)) as pipeline:
        pipeline.run(batches(kind, count), after=lambda step: pipeline.save(Path(folder), keep))
        pipeline.restore(Path(folder), count - 1)
        pipeline.run(batches(kind, count)[-1:])
        return states(pipeline.trainers)


def save_where_one_cannot(kind: str, folders: list[str]) -> str:
    """The last process's folder is none; the others learn of it."""
    with Pipeline(make(kind)) as pipeline:
        pipeline.run(batches(kind, 3))
        with PipelineRaises(pw.StateError) as raised:
            pipeline.save(Path(folders[pipeline.stage]))
        pipeline.run(batches(kind, 3))  # and go on
        assert pipeline.learner.steps == 6
    return raised.message


class PipelineRaises:
    """``pytest.raises`` for processes without pytest."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind, self.message = kind, ""

    def __enter__(self) -> "PipelineRaises":
        return self

    def __exit__(self, kind: Any, error: Any, _: object) -> bool:
        assert isinstance(error, self.kind), f"{error!r} instead of {self.kind}"
        self.message = str(error)
        return True


def refuse(what: dict[str, Any], kind: str = "local") -> None:
    """Make a pipeline that cannot be."""
    Pipeline(make(kind), **what).close()


def refuse_stages() -> None:
    few = pw.Blocks([torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)], torch.zeros(2, 6))
    Pipeline(pw.LocalLoss(few, 3, optimizer=sgd)).close()


def refuse_two_ways() -> None:
    learner = pw.ActivationRelaxation(mlp(last=3), optimizer=sgd)
    Pipeline(learner).close()  # type: ignore[arg-type]


def refuse_replicas() -> None:
    Pipeline(make("interlocking 2"), replicas=2).close()


def refuse_different_cuts() -> None:
    Pipeline(make("local"), cuts=[0, 1 + dist.get_rank()]).close()


def refuse_batch(rows: list[tuple[int, int]]) -> None:
    """Batches with so many inputs and targets."""
    with Pipeline(make("local"), timeout_s=4.0) as pipeline:
        pipeline.run([(torch.randn(n, 6), torch.zeros(m, dtype=torch.long)) for n, m in rows])


def refuse_other_steps(folder: str) -> None:
    """The first stage restores one checkpoint, the other another one."""
    with Pipeline(make("local"), timeout_s=4.0) as pipeline:
        pipeline.run(batches("local", 2, last=16), after=lambda _: pipeline.save(Path(folder)))
        pipeline.restore(Path(folder), 1 + pipeline.stage)
        pipeline.run(batches("local", 30))


def refuse_other_learner(folder: str) -> str:
    """A checkpoint of another method's components is no checkpoint of this learner, and changes nothing."""
    with Pipeline(make("local")) as pipeline:
        pipeline.save(Path(folder))
    other = make("associated")
    before = copy.deepcopy(states(other.trainers))
    with Pipeline(other) as pipeline:
        with PipelineRaises(pw.StateError) as raised:
            pipeline.restore(Path(folder))
        assert difference(states(pipeline.learner.trainers), before) == ""
    return raised.message


def send_noise() -> None:
    """The first stage sends something else than signals."""
    with Pipeline(make("local"), timeout_s=4.0) as pipeline:
        if pipeline.stage == 0:
            group = pipeline._groups.links[1]
            dist.send(torch.tensor([1000]), 1, group=group)
            dist.send(torch.zeros(1000, dtype=torch.uint8), 1, group=group)
            pipeline.gather()
        else:
            pipeline.run([])


def unpickle(kind: str, folder: str) -> list[str]:
    """What pickles asked for while signals, components and checkpoints went between processes."""
    if not AUDIT:
        AUDIT.append("listening")
        sys.addaudithook(lambda event, args: note(event, args))
    LISTENING.append(True)
    try:
        with Pipeline(make(kind)) as pipeline:
            pipeline.run(batches(kind, 3))
            pipeline.gather()
            pipeline.save(Path(folder))
    finally:
        LISTENING.clear()
    return AUDIT[1:]


def note(event: str, args: Any) -> None:
    if LISTENING and event == "pickle.find_class":
        AUDIT.append(".".join(map(str, args)))


def unpickle_after_all() -> list[str]:
    """The audit finds what it is there for."""
    AUDIT[:] = AUDIT or ["listening"]
    sys.addaudithook(lambda event, args: note(event, args))
    LISTENING.append(True)
    dist.all_gather_object([None, None], Path("a"))
    LISTENING.clear()
    return AUDIT[1:]


def fail(failing: int, how: str) -> None:
    """One stage raises in the middle of a run."""
    with Pipeline(make("local"), timeout_s=4.0) as pipeline:

        def after(step: int) -> None:
            if pipeline.stage == failing and step == 5:
                raise {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[how]("no good")

        try:
            pipeline.run(batches("local", 40), after)
        except KeyboardInterrupt as error:
            raise RuntimeError("interrupted") from error


def dawdle(slow: int, seconds: float) -> dict[str, Any]:
    """One stage rests in the middle of a run."""
    with Pipeline(make("local"), timeout_s=2.0) as pipeline:
        pipeline.run(
            batches("local", 12),
            lambda step: time.sleep(seconds) if (pipeline.stage, step) == (slow, 5) else None,
        )
        return states(pipeline.trainers)


def dawdle_as_replica() -> dict[str, Any]:
    """One of two replicas rests for longer than torch would wait."""
    dist.group.WORLD.set_timeout(timedelta(seconds=3))
    with Pipeline(make("local, plain"), replicas=2, timeout_s=2.0) as pipeline:
        pipeline.run(
            batches("local, plain", 6, last=16),
            lambda step: time.sleep(4.5) if (pipeline.replica, step) == (1, 3) else None,
        )
        return states(pipeline.trainers)


@contextmanager
def listening(port: int) -> Iterator[None]:
    """Somebody else has this port."""
    with socket.create_server(("", port)):
        yield
