"""Writes a bench's trials for trackers that show curves: TensorBoard and Trackio."""

import contextlib
import io
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from plywise._util.extras import TENSORBOARD, import_extra
from plywise.arena.given import shorten_names
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.records import FINAL, TUNING, TrialRecord
from plywise.arena.scoring.score import find_best
from plywise.errors import BenchError


class Point(NamedTuple):
    """What was measured at a step, by name, and when, in seconds since 1970."""

    step: int
    values: dict[str, float]
    when: float


@dataclass(frozen=True)
class TrackedRun:
    """A trial as a tracker has it.

    Attributes:
        name: the same for the same trial, whenever it is exported; a path of folders.
        settings: which trial it is, its numbers, and why it failed, if it did.
        points: its measurements in order.
        results: what the trial came to.
    """

    name: str
    settings: dict[str, str | float]
    points: list[Point]
    results: dict[str, float]


class Exported(NamedTuple):
    """How many trials were written, and how many were there before."""

    written: int
    before: int


def list_runs(folder: Path) -> list[TrackedRun]:
    """Return the trials of a bench, finished or not.

    Args:
        folder: where bench.json and trials.jsonl are.

    Raises:
        PlywiseError: it holds no bench, or a line is not a trial.
    """
    bench, lines = shorten_names(*read_bench(folder))
    return [make_run(line, bench["workloads"][line["workload"]]["metric"]) for line in lines]


def make_run(line: TrialRecord, metric: str) -> TrackedRun:
    """Make a run from a line of the ledger; ``metric`` is the name of the workload's metric."""
    tuning = line["purpose"] == TUNING
    last = f"trial {line['trial']}" if tuning else f"seed {line['seed']}"
    which = [line["workload"], line["method"], *([TUNING] if tuning else [FINAL, line["track"]]), last]
    settings = {name: line[name] for name in ("workload", "method", "purpose", "track", "trial", "seed")}
    results = {f"best validation {metric}": find_best(line), f"test {metric}": line["test"]}
    return TrackedRun(
        name="/".join(part.replace("/", "_").replace(":", ".") for part in which),
        settings={**settings, **line["numbers"], "failure": line["failure"] or ""},
        points=_list_points(line, metric),
        results={name: value for name, value in results.items() if value is not None and line["steps"]},
    )


def to_tensorboard(folder: Path, to: Path) -> Exported:
    """Write event files, a folder for each trial that has none yet.

    A trial's folder is there whole or not at all, so that a bench that is running can be exported again.

    Args:
        folder: where bench.json and trials.jsonl are.
        to: TensorBoard's ``--logdir``.

    Raises:
        PlywiseError: TensorBoard is not installed, or there is no bench.
    """
    writer = import_extra("torch.utils.tensorboard", TENSORBOARD).SummaryWriter
    runs = list_runs(folder)
    new = [run for run in runs if not (to / run.name).exists()]
    partial = to / ".partial"
    for run in new:
        shutil.rmtree(partial, ignore_errors=True)
        with writer(partial) as board:
            for point in run.points:
                for name, value in point.values.items():
                    board.add_scalar(name, value, point.step, walltime=point.when)
            board.add_hparams(run.settings, run.results, run_name=".")
        (to / run.name).parent.mkdir(parents=True, exist_ok=True)
        partial.replace(to / run.name)
    return Exported(len(new), len(runs) - len(new))


def to_trackio(folder: Path, project: str) -> Exported:
    """Write runs into a local Trackio project, if it does not have them yet; `trackio show` shows them.

    Args:
        folder: where bench.json and trials.jsonl are.
        project: its name. Trackio keeps it where its own settings say (``TRACKIO_DIR``).

    Raises:
        PlywiseError: Trackio is not installed, it refuses the name, or there is no bench.
    """
    trackio = import_extra("trackio", "--trackio needs Trackio: pip install 'plywise[tracking]'.")
    runs = list_runs(folder)
    try:
        before = {run.name for run in trackio.Api().runs(project)}
    except ValueError:
        before = set()  # there is no such project yet
    new = [run for run in runs if run.name not in before]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says several lines of each run
            for run in new:
                _track(trackio, project, run)
    except ValueError as error:
        raise BenchError(f"Trackio does not take the project {project!r}: {error}") from error
    return Exported(len(new), len(runs) - len(new))


def _track(trackio: Any, project: str, run: TrackedRun) -> None:
    trackio.init(
        project, name=run.name, config=run.settings, embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    for point in run.points[:-1]:
        trackio.log(point.values, step=point.step)
    last = run.points[-1] if run.points else Point(0, {}, 0.0)
    trackio.log({**last.values, **run.results}, step=last.step)
    trackio.finish()


def _list_points(line: TrialRecord, metric: str) -> list[Point]:
    names = {"training loss": "loss", f"validation {metric}": "validation", "cpu seconds": "cpu"}
    ended = datetime.fromisoformat(line["finished"]).timestamp()
    began = ended - (line["wall"][-1] if line["wall"] else 0.0)
    found = []
    for index, step in enumerate(line["steps"]):
        # a trial that failed while it was measured has a step without a metric
        known = {name: line[key][index] for name, key in names.items() if index < len(line[key])}
        values = {name: value for name, value in known.items() if value is not None}
        when = began + (line["wall"][index] if index < len(line["wall"]) else line["wall"][-1])
        found.append(Point(step, values, when))
    return found
