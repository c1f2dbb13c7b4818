"""`plywise pipeline`: the training of `plywise train` in the processes that torchrun starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from plywise.cli.console import console, notes
from plywise.cli.training import Flags, Switch, again, conclude, following, introduce, plan_from
from plywise.errors import PipelineError, PlywiseError

if TYPE_CHECKING:
    from plywise.training.config import TrainConfig
    from plywise.training.session import Session


def pipeline(
    plan: str | None = None,
    /,
    *,
    flags: Flags | None = None,
    replicas: int | None = None,
    cuts: str | None = None,
    fresh: Switch = False,
) -> int:
    r"""Train in several processes: each holds a stage of the blocks, and all compute at the same time.

    torchrun starts it. The weights are those of `plywise train` bit for bit, and either goes on with the
    other's runs, with any number of stages. (Replicas average gradients, which rounds otherwise.) All
    processes see the same --out; each stage has a log of its own there, log.stage0.jsonl and so on.

    Ctrl-C stops the first stage; the others finish what is on its way, and all write a checkpoint. A process
    that is lost ends all; torchrun --max-restarts 3 then goes on from the last checkpoint by itself.

    For example:

        torchrun --nproc-per-node 2 -m plywise pipeline
        torchrun --nproc-per-node 2 -m plywise pipeline mine:net --data mine.npz
        torchrun --nproc-per-node 2 -m plywise pipeline plan.toml --cuts 0,1
        torchrun --nproc-per-node 4 -m plywise pipeline --replicas 2
        # on HOST; on the other host, --node-rank 1
        torchrun --nnodes 2 --node-rank 0 --master-addr HOST \
            --master-port 29400 -m plywise pipeline plan.toml

    Args:
        plan: a TOML file, or your model as module:name; see `plywise train --help`.
        flags: what is trained.
        replicas: processes that share each stage's batches. Default 1.
        cuts: the first component of each stage, as in 0,2. Default: balanced by measured costs.
        fresh: start again, and throw away what the folder holds of a run.
    """
    config = plan_from(plan, flags, replicas=replicas, cuts=cuts)
    if "RANK" not in os.environ:
        raise PipelineError(
            "A pipeline is several processes, and torchrun starts them: "
            f"torchrun --nproc-per-node 2 -m {again()}",
            see="pipeline-start",
        )
    rank = os.environ["RANK"]
    fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # a restart goes on
    try:
        finished, step = _train(config, fresh, is_first=rank == "0")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"What {config.out} holds is the last checkpoint.") from None
    except PlywiseError as error:  # it keeps its kind and its page
        error.args = (f"rank {rank}: {error}",)
        raise
    except Exception as error:
        from plywise.training.session import format_error

        raise PlywiseError(f"rank {rank}: {format_error(error)}") from error
    if not finished and rank == "0":
        raise KeyboardInterrupt(
            f"The checkpoint of step {step} is in {config.out}: the same command goes on from there, and so "
            "does `plywise train` with the same flags."
        )
    return 0 if finished else 130


def _train(plan: TrainConfig, fresh: bool, is_first: bool) -> tuple[bool, int]:
    """Train; return whether the run is finished, and its last step. The first process shows progress."""
    from plywise.training.open_pipeline import open_pipeline

    with open_pipeline(plan, fresh=fresh) as session:
        if is_first:
            screen = notes()
            introduce(session, screen, _layout(session))
            with following(session, screen) as show:
                finished = session.run(show)
        else:
            finished = session.run()
        step = session.step
    if is_first and finished:
        conclude(session, console())
    return finished, step


def _layout(session: Session) -> str:
    engine: Any = session.engine
    ends = [*engine.cuts[1:], len(engine.learner.trainers)]
    stages = ", ".join(
        f"{start}" if start == end - 1 else f"{start}–{end - 1}"
        for start, end in zip(engine.cuts, ends, strict=True)
    )
    copies = f", each in {engine.replicas} processes" if engine.replicas > 1 else ""
    return f"Components by stage: {stages}{copies}."
