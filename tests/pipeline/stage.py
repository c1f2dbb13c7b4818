"""One process of a pipeline, started like torchrun starts it: ``python -m pipeline.stage FOLDER SETTINGS``.

It goes on from the last checkpoint in the folder, says how far it is and what it dies of, and leaves its
states.
"""

import json
import os
import signal
import sys
import time
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plywise._util.files import write_whole
from plywise.local import checkpoint
from plywise.pipeline.pipeline import Pipeline

from .learners import batches, make, states


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Train, in the place that the environment says.

    Args:
        folder: for checkpoints and reports.
        settings: ``kind`` of the learner; ``cuts``, ``replicas`` and ``timeout_s`` of the `Pipeline`;
            ``count`` of batches, None for no end; ``save``, steps from checkpoint to checkpoint, None for
            none; ``kill``, by attempt, [rank, step] of a process that kills itself there; ``stops``, steps at
            which one pipeline ends and another one begins; ``rest``, [rank, step] of a process that rests
            there for three seconds.
    """
    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kill = settings.get("kill", {}).get(attempt)
    learner = make(settings["kind"])
    wanted = {name: settings[name] for name in ("cuts", "replicas", "timeout_s") if name in settings}
    for stop in settings.get("stops", [settings.get("count")]):
        with Pipeline(learner, **wanted) as pipeline:
            if checkpoint.steps(folder / "checkpoints"):
                pipeline.restore(folder / "checkpoints")

            def after(step: int) -> None:
                if settings.get("save") and step % settings["save"] == 0:
                    pipeline.save(folder / "checkpoints")
                if [rank, step] == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if [rank, step] == settings.get("rest"):
                    time.sleep(3.0)
                if settings.get("count") is None:
                    (folder / f"{rank}.step").write_text(str(step))
                    time.sleep(0.005)

            try:
                pipeline.run(feed(settings, learner.steps, stop), after)
            except BaseException as error:
                report = {"type": type(error).__name__, "message": str(error), "when": time.monotonic()}
                write_whole(folder / f"{rank}.json", json.dumps(report))
                raise
        assert not dist.is_initialized(), "the pipeline leaves what it has joined"
    torch.save(states(pipeline.trainers), folder / f"{rank}.pt")


def feed(settings: dict[str, Any], start: int, stop: int | None) -> Any:
    kind, number = settings["kind"], settings.get("count")
    if number is not None:
        return islice(batches(kind, number), start, stop)
    return (batch for _ in count() for batch in batches(kind, 8, last=16))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
