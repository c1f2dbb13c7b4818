"""What a bench compares: `BenchConfig` as the user gives it, `ResolvedBench` with all names looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from plywise._util.import_path import load
from plywise._util.scratch import Scratch
from plywise.arena.method import Method
from plywise.arena.methods import find_method
from plywise.arena.run.search import SEARCHES, find_search
from plywise.arena.workload import Workload
from plywise.arena.workloads import find_workload
from plywise.arena.workloads.own import make_checked_workload, own_workload
from plywise.data.batches import Split
from plywise.data.parts import Data
from plywise.errors import BenchError, DataError

OLD_FIELDS = {"entries": "workloads", "patience": "timeout_s"}
"""Names of a config's fields in the files of plywise 0.1."""

TIMEOUT_S = 600.0
"""Seconds that a trial may take, unless the user or a plan gives another limit."""


class TrialSource(Protocol):
    """Where a trial's process gets its workload and its method from; it is pickled."""

    @property
    def name(self) -> str:
        """The workload's name in the ledger."""
        ...

    def load(self, data: Data) -> Workload:
        """Return the workload, with data that have been read and checked before."""
        ...

    def find_method(self, name: str) -> Method:
        """Return the method of that name."""
        ...

    def require(self) -> None:
        """Check that everything it names can be imported here.

        Raises:
            PlywiseError: it cannot.
        """
        ...

    def describe(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Further fields of the trial's line in the ledger."""
        ...


@dataclass(frozen=True)
class ObjectSource:
    """Gives trials in this process a workload and methods that are objects, not addresses.

    Attributes:
        workload: the workload.
        methods: by name.
    """

    workload: Workload
    methods: Mapping[str, Method]

    @property
    def name(self) -> str:
        """The workload's name."""
        return self.workload.name

    def load(self, data: Data) -> Workload:
        """Return the workload."""
        return self.workload

    def find_method(self, name: str) -> Method:
        """Return the method of that name."""
        return self.methods[name]

    def require(self) -> None:
        """Do nothing: objects need no import."""

    def describe(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Nothing: the line has the numbers."""
        return {}


@dataclass(frozen=True)
class WorkloadSpec:
    """A workload as the user names it.

    Attributes:
        name: of a shipped workload, or what the user's own is called.
        model: ``module:function`` of the user's model; empty for a shipped workload.
        data: where the user's data are.
        read: how they are read, see `plywise.data.reading.ReadOptions.parse`.
        loss: ``module:function`` of the user's loss, or empty.
        metric: ``module:function`` of the user's metric, or empty.
        step: ``module:function`` of the user's step function, or empty.
        keep_batches: batches that are kept of a stream; None: the reader's.
        calls: how the model is called (`plywise.arena.workloads.own_calls`), once it is known.
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
    step: str = ""
    keep_batches: int | None = None
    calls: str = ""

    def make(self, folder: Path | None = None) -> Workload:
        """Return the workload; the user's own is made, its data are read, and both are checked.

        Args:
            folder: where the batches of a stream are kept. Default: the folder for temporary files.
        """
        if self.model:
            names = ("read", "loss", "metric", "step", "batch_size", "keep_batches", "blocks")
            how: dict[str, Any] = {name: getattr(self, name) for name in names}
            return self.apply(own_workload(self.name, self.model, self.data, folder=folder, **how))
        return self.apply(find_workload(self.name))

    def load(self, data: Data) -> Workload:
        """The workload of a settled spec, in another process: nothing is read, made or checked again."""
        if self.model:
            names = ("loss", "metric", "step", "calls", "classes")
            how: dict[str, Any] = {name: getattr(self, name) for name in names}
            return self.apply(make_checked_workload(self.name, self.model, data, **how))
        return self.apply(find_workload(self.name))

    def find_method(self, name: str) -> Method:
        """Return the arena's method called ``name``, or the user's at that address."""
        return find_method(name)

    def require(self) -> None:
        """Check that the user's model can be imported here."""
        if self.model:
            load(self.model, "your model")

    def describe(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Nothing: the line has the numbers."""
        return {}

    def settle(self, workload: Workload) -> WorkloadSpec:
        """Return the spec with all unknown fields filled in."""
        if not self.model:
            return self
        names = ("batch_size", "steps", "blocks", "classes", "calls")
        return replace(self, **{name: getattr(workload, name) for name in names})

    def apply(self, workload: Workload) -> Workload:
        """A workload with the spec's settings; the target holds only for its own length and batch size."""
        wanted = {"batch_size": self.batch_size, "steps": self.steps, "blocks": self.blocks}
        changed: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
        kept = all(getattr(workload, key) == value for key, value in changed.items())
        return workload if kept else replace(workload, **changed, target=None)


@dataclass(frozen=True)
class BenchConfig:
    """What is compared, and how much of it.

    Attributes:
        workloads: the workloads.
        methods: names of the methods.
        trials: points that each method is tuned by; 0: only defaults.
        seeds: final runs of each method on each track.
        device: where trials run.
        search: how the points are found; see `plywise.arena.run.search`.
        threads: torch's threads in each trial.
        timeout_s: seconds that a trial may take; None: 600, or what a plan for a budget finds.
    """

    workloads: tuple[WorkloadSpec, ...]
    methods: tuple[str, ...]
    trials: int = 8
    seeds: int = 3
    device: str = "cpu"
    search: str = SEARCHES[0]
    threads: int = 1
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not self.workloads or not self.methods:
            raise BenchError("A bench needs a workload and a method at least.")
        for kind, names in (("workload", [w.name for w in self.workloads]), ("method", list(self.methods))):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise BenchError(f"The {kind} {twice!r} is given twice.")
        is_whole = isinstance(self.trials, int) and isinstance(self.seeds, int)
        if not is_whole or self.trials < 0 or self.seeds < 1:
            raise BenchError(
                "Trials are a whole number of at least 0 and seeds of at least 1, not "
                f"{self.trials!r} and {self.seeds!r}."
            )
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise BenchError(f"A trial's timeout is in seconds, more than 0, not {self.timeout_s:g}.")

    @property
    def trial_limit_s(self) -> float:
        """Seconds that a trial may take."""
        return TIMEOUT_S if self.timeout_s is None else self.timeout_s

    @staticmethod
    def from_json(fields: dict[str, Any]) -> BenchConfig:
        """Return the config whose ``asdict`` was kept as JSON, by this plywise or by 0.1.

        Raises:
            TypeError, ValueError, KeyError: it is none.
        """
        named = {OLD_FIELDS.get(name, name): value for name, value in fields.items()}
        workloads = tuple(WorkloadSpec(**spec) for spec in named["workloads"])
        return BenchConfig(**{**named, "workloads": workloads, "methods": tuple(named["methods"])})


@dataclass(frozen=True)
class ResolvedWorkload:
    """A workload whose names have been looked up, and whose data are in a file that other processes map.

    Attributes:
        source: what gives the same workload in other processes.
        workload: the workload.
        file: where its data are.
        sizes: samples of each part.
        digest: of all values; empty where it was not asked for.
    """

    source: TrialSource
    workload: Workload
    file: Path
    sizes: dict[str, int]
    digest: str = ""

    @staticmethod
    def write(source: TrialSource, workload: Workload, file: Path) -> ResolvedWorkload:
        """Read a workload's data and write them to ``file``.

        Raises:
            PlywiseError: the data cannot be read, or are fewer than a batch.
        """
        data = workload.make_data()
        size, found = workload.batch_size, len(data.train)
        if isinstance(data.train, Split) and size > found:
            raise DataError(f"{workload.name} has {found} training samples, less than a batch of {size}.")
        data.save(file)
        sizes = {name: len(part) for name, part in vars(data).items()}
        return ResolvedWorkload(source, workload, file, sizes, data.fingerprint())

    def apply(self, spec: WorkloadSpec) -> ResolvedWorkload:
        """Return the same with the settings of another spec of this workload, as with more steps."""
        workload = spec.apply(self.workload)
        return replace(self, source=spec.settle(workload), workload=workload)


@dataclass(frozen=True)
class ResolvedBench:
    """A config with its methods found, its workloads made and its data read, into files until `close`.

    Attributes:
        config: what was asked for; methods by the names that they are listed by.
        methods: by name.
        workloads: by name.
        refused: why a method cannot run on a workload, by workload and method.
    """

    config: BenchConfig
    methods: dict[str, Method]
    workloads: dict[str, ResolvedWorkload]
    refused: dict[tuple[str, str], str]
    _scratch: Scratch | None = None

    def with_config(self, config: BenchConfig) -> ResolvedBench:
        """Return the same methods and data with other numbers of trials, seeds or steps."""
        workloads = {spec.name: self.workloads[spec.name].apply(spec) for spec in config.workloads}
        return replace(self, config=config, workloads=workloads)

    @property
    def guesses(self) -> list[str]:
        """What was guessed about the user's data, a sentence each."""
        return [guess for resolved in self.workloads.values() for guess in resolved.workload.guesses]

    @property
    def steps(self) -> dict[str, int]:
        """Steps of a run on each workload."""
        return {name: resolved.workload.steps for name, resolved in self.workloads.items()}

    @property
    def running(self) -> dict[str, list[Method]]:
        """The methods that can run on each workload."""
        return {
            name: [method for m, method in self.methods.items() if (name, m) not in self.refused]
            for name in self.workloads
        }

    def close(self) -> None:
        """Remove the files of the data."""
        if self._scratch:
            self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resolve_bench(config: BenchConfig, folder: Path | None = None) -> ResolvedBench:
    """Look up every name of a config, make the workloads and read their data, once for all.

    Args:
        config: what is asked for.
        folder: where the files of the data are made, in a folder of their own that the next one removes if
            this process is killed. Default: the folder for temporary files.

    Raises:
        PlywiseError: there is no such method, workload or search; one lacks a package; or a workload cannot
            be made: a file is missing, a factory raises, shapes do not fit.
    """
    methods = [find_method(name) for name in config.methods]
    for method in methods:
        method.require()
    config = replace(config, methods=tuple(method.name for method in methods))
    find_search(config.search)
    scratch = Scratch(folder)
    try:
        workloads = {}
        for number, spec in enumerate(config.workloads):
            workload = spec.make(scratch.path)
            file = scratch.path / f"{number}.pt"
            workloads[spec.name] = ResolvedWorkload.write(spec.settle(workload), workload, file)
        refused = _refuse(workloads, methods)
    except BaseException:
        scratch.close()
        raise
    return ResolvedBench(config, {method.name: method for method in methods}, workloads, refused, scratch)


def _refuse(
    workloads: Mapping[str, ResolvedWorkload], methods: Sequence[Method]
) -> dict[tuple[str, str], str]:
    refused = {
        (name, method.name): reason
        for name, resolved in workloads.items()
        for method in methods
        if (reason := method.refuses(resolved.workload))
    }
    if len(refused) == len(workloads) * len(methods):
        (_, method), reason = next(iter(refused.items()))
        raise BenchError(f"No method can run: {method}: {reason}.")
    return refused
