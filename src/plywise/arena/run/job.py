"""A picklable description of one trial, which runs it in any process."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plywise._util.environment import environment
from plywise._util.import_path import user_line
from plywise._util.plain_json import map_floats, round_digits
from plywise.arena.method import TrialContext
from plywise.arena.run.config import TrialSource
from plywise.arena.run.trial import TrialResult, run_trial
from plywise.arena.scoring.records import FINAL, Key
from plywise.arena.workload import Workload
from plywise.data.batches import Split, clone_batch, list_tensors
from plywise.data.parts import Data
from plywise.errors import BenchError

PROBE_STEPS, PROBE_SAMPLES = 10, 500
"""Steps of a probe, and samples of each set that it measures on, unless a batch holds more."""


@dataclass(frozen=True)
class TrialJob:
    """A trial to run: a picklable description of it.

    Attributes:
        key: which one it is.
        source: gives its workload and its method.
        numbers: the method's tuned numbers.
        data: file that `Data.save` wrote.
        device: where it runs.
        steps: steps of the run; None: the workload's.
        measure_every: steps between two measurements; None: the workload's.
        probe: whether to run only a few steps on a few samples, to measure their cost.
    """

    key: Key
    source: TrialSource
    numbers: dict[str, float]
    data: str
    device: str = "cpu"
    steps: int | None = None
    measure_every: int | None = None
    probe: bool = False

    def run(self) -> dict[str, Any]:
        """Run the trial; the line for the ledger, failures included."""
        peak = Peak(self.device)
        method = self.source.find_method(self.key.method)
        gradients = method.gradients
        try:
            data = Data.load(Path(self.data))
            workload = self._shorten(self.source.load(data))
            if self.probe:
                count = max(PROBE_SAMPLES, workload.batch_size)
                data = Data(*(part.head(count) for part in data.parts))
            data = data.to(self.device)
            peak.begin(data)
            result = run_trial(
                lambda: method.make(make_context(workload, data, self)),
                data,
                workload.task,
                seed=self.key.seed,
                steps=workload.steps,
                batch_size=workload.batch_size,
                measure_every=workload.interval,
                test=self.key.purpose == FINAL and not self.probe,
                train_eval_size=workload.train_eval_size,
                meter=peak,
            )
            if method.count and result.failure is None:
                gradients = method.count(make_context(workload, data, self))
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__} before the first step: {error}{user_line(error)}"
            result = TrialResult(self.key.seed, failure=why)
        return self._record(gradients, result, peak.mib)

    def failed(self, why: str) -> dict[str, Any]:
        """Make the line of a trial whose process did not report one."""
        method = self.source.find_method(self.key.method)
        return self._record(method.gradients, TrialResult(self.key.seed, failure=why), None)

    def _shorten(self, workload: Workload) -> Workload:
        changes: dict[str, Any] = {"steps": self.steps, "measure_every": self.measure_every}
        if self.probe:
            changes = {"steps": PROBE_STEPS, "measure_every": PROBE_STEPS}
        return replace(workload, **{name: value for name, value in changes.items() if value is not None})

    def _record(self, gradients: float, result: TrialResult, peak: float | None) -> dict[str, Any]:
        outcome = map_floats(result.as_dict(), round_digits)
        finished = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        more = {"numbers": self.numbers, "gradients": gradients, "peak_mib": peak, "finished": finished}
        return {**self.key._asdict(), **self.source.describe(self.numbers), **outcome, **more}


def make_context(workload: Workload, data: Data, job: TrialJob) -> TrialContext:
    """Return what the method gets; called with the seed set, so that the weights depend on it alone."""
    return TrialContext(
        model=workload.make_model().to(job.device),
        task=workload.task,
        numbers=job.numbers,
        steps=workload.steps,
        example=clone_batch(next(iter(data.train.chunks(min(workload.batch_size, 32))))[0]),
        blocks=workload.blocks,
        classes=workload.classes,
        device=job.device,
    )


def require_device(device: str) -> None:
    """Check that trials can run on a device of this machine.

    Raises:
        PlywiseError: they cannot; says what there is.

    Example:
        >>> require_device("cpu")
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise BenchError(
            f"Nothing can run on device {device!r} here: {why}. There are: {environment()['devices']}. Name "
            "one of them with --device, or install a torch that knows yours."
        ) from error


class Peak:
    """Measures the peak memory of training, with model and method, without the data.

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
        """Measure the memory before model and method are made."""
        parts = [part for part in data.parts if isinstance(part, Split)]
        for tensor in list_tensors([(part.x, part.y) for part in parts]):
            tensor.sum()  # pages of a mapped file count once they have been read
        self._before = self._reset_peak()

    def __enter__(self) -> None:
        """Leave out memory that the first measurement used and freed."""
        self._reset_peak()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.mib = round(max(0.0, self._read_peak() - self._before), 1)

    def _reset_peak(self) -> float | None:
        """Make the peak what there is now, MiB; None where that cannot be done."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self._read_peak()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return self._read_peak()
        except OSError:  # not Linux
            return None

    def _read_peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(row for row in status if row.startswith("VmHWM")).split()[1]) / 2**10
