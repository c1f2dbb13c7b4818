"""One trial of a bench, in words that travel to another process, and what comes of it there."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plywise._util.environment import environment
from plywise._util.import_path import user_line
from plywise.arena.method import TrialContext
from plywise.arena.methods import find_method
from plywise.arena.run.trial import TrialResult, run_trial
from plywise.arena.scoring.records import FINAL, Key
from plywise.arena.workload import Workload
from plywise.arena.workloads import find_workload
from plywise.arena.workloads.own import checked_workload, own_workload
from plywise.data.parts import Data
from plywise.errors import PlywiseError

EVALUATIONS = 25
"""Measurements in a run, besides the one before its first step."""


@dataclass(frozen=True)
class WorkloadSpec:
    """A workload as it was asked for.

    Attributes:
        name: of a shipped workload, or what the user's own is called.
        model: ``module:function`` of the user's model; empty for a shipped workload.
        data: where the user's data are.
        read: how they are read, see `plywise.data.reading.ReadOptions.parse`.
        loss: ``module:function`` of the user's loss, or empty.
        metric: ``module:function`` of the user's metric, or empty.
        batch_size: samples a batch; None: the workload's.
        steps: steps of a run; None: the workload's.
        blocks: blocks for local learners; None: the workload's.
        classes: number of classes of the user's, once it is known.
    """

    name: str
    model: str = ""
    data: str = ""
    loss: str = ""
    metric: str = ""
    batch_size: int | None = None
    steps: int | None = None
    blocks: int | None = None
    classes: int = 0
    read: str = ""

    def workload(self) -> Workload:
        """The workload, as the entry wants it."""
        if self.model:
            made = own_workload(
                self.name,
                self.model,
                self.data,
                read=self.read,
                loss=self.loss,
                metric=self.metric,
                blocks=self.blocks,
            )
            return self.applied(made)
        return self.applied(find_workload(self.name))

    def again(self, data: Data) -> Workload:
        """A settled entry's workload, in another process: nothing is read, made or checked again."""
        if self.model:
            made = checked_workload(
                self.name, self.model, data, loss=self.loss, metric=self.metric, classes=self.classes
            )
            return self.applied(made)
        return self.applied(find_workload(self.name))

    def settled(self, workload: Workload) -> WorkloadSpec:
        """The entry with nothing left to be found out."""
        if not self.model:
            return self
        known = {name: getattr(workload, name) for name in ("batch_size", "steps", "blocks", "classes")}
        return replace(self, **known)

    def applied(self, workload: Workload) -> Workload:
        """A workload with the entry's settings; its target is one of its own length and batch size."""
        wanted = {"batch_size": self.batch_size, "steps": self.steps, "blocks": self.blocks}
        changed: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
        kept = all(getattr(workload, key) == value for key, value in changed.items())
        return workload if kept else replace(workload, **changed, target=None)


@dataclass(frozen=True)
class TrialJob:
    """A trial to run.

    Attributes:
        key: which one it is.
        entry: the workload.
        numbers: the method's tuned numbers.
        data: file that `Data.save` wrote.
        device: where it runs.
    """

    key: Key
    entry: WorkloadSpec
    numbers: dict[str, float]
    data: str
    device: str = "cpu"

    def perform(self) -> dict[str, Any]:
        """Run the trial; the line for the ledger, failures included."""
        peak = Peak(self.device)
        method = find_method(self.key.method)
        gradients = method.gradients
        try:
            data = Data.load(Path(self.data))
            workload = self.entry.again(data)
            data = on(self.device, data)
            peak.begin(data)
            record = run_trial(
                lambda: method.make(setting(workload, data, self)),
                data,
                workload.task,
                seed=self.key.seed,
                steps=workload.steps,
                batch_size=workload.batch_size,
                measure_every=max(1, workload.steps // EVALUATIONS),
                test=self.key.purpose == FINAL,
                meter=peak,
            )
            if method.count and record.failure is None:
                gradients = method.count(setting(workload, data, self))
        except Exception as error:
            why = f"{type(error).__name__} before the first step: {error}{user_line(error)}"
            record = TrialResult(self.key.seed, failure=why)
        return line(self, gradients, record, peak.mib)

    def failed(self, why: str) -> dict[str, Any]:
        """The line if its process did not live to tell."""
        return line(self, find_method(self.key.method).gradients, TrialResult(self.key.seed, failure=why))


def setting(workload: Workload, data: Data, job: TrialJob) -> TrialContext:
    """What the method gets; called with the seed set, so that the weights depend on it alone."""
    return TrialContext(
        model=workload.make_model().to(job.device),
        task=workload.task,
        numbers=job.numbers,
        steps=workload.steps,
        example=data.train.x[: min(workload.batch_size, 32)].clone(),
        blocks=workload.blocks,
        classes=workload.classes,
    )


def line(job: TrialJob, gradients: float, record: TrialResult, peak: float | None = None) -> dict[str, Any]:
    """A trial as the ledger keeps it."""
    outcome = {key: rounded(value) for key, value in record.as_dict().items()}
    finished = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    more = {"numbers": job.numbers, "gradients": gradients, "peak_mib": peak, "finished": finished}
    return {**job.key._asdict(), **outcome, **more}


def rounded(value: Any) -> Any:
    """Six significant digits are enough of everything measured."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def on(device: str, data: Data) -> Data:
    """The data on a device."""
    if device == "cpu":
        return data
    moved = {name: type(split)(split.x.to(device), split.y.to(device)) for name, split in vars(data).items()}
    return Data(**moved)


def require_device(device: str) -> None:
    """See that trials can run on a device of this machine.

    Raises:
        PlywiseError: they cannot; says what there is.

    Example:
        >>> require_device("cpu")
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise PlywiseError(
            f"Nothing can run on device {device!r} here: {why}. There are: {environment()['devices']}. Name "
            "one of them with --device, or install a torch that knows yours.",
            see="error-bench",
        ) from error


class Peak:
    """A meter of the most memory that training takes, model and method included, the data apart.

    Args:
        device: where it trains: of a GPU its own memory, else that of this process, by Linux's account.

    Attributes:
        mib: the outcome; None where the system does not say, or training did not begin.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._before: float | None = None
        self.mib: float | None = None

    def begin(self, data: Data) -> None:
        """Look at what is there before model and method are made."""
        for split in vars(data).values():  # pages of a mapped file count once they have been read
            split.x.sum(), split.y.sum()
        self._before = self._forgotten()

    def __enter__(self) -> None:
        """What was taken and given back before, for the first measurement, is none of training's."""
        self._forgotten()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.mib = round(max(0.0, self._most() - self._before), 1)

    def _forgotten(self) -> float | None:
        """Make the peak what there is now, MiB; None where that cannot be done."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self._most()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return self._most()
        except OSError:  # not Linux
            return None

    def _most(self) -> float:
        """The peak, MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(row for row in status if row.startswith("VmHWM")).split()[1]) / 2**10
