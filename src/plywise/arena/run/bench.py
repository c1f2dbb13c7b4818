"""A bench from its first trial to its last: equal tuning for all, then fresh seeds for what was chosen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise._util.sealed import seal, unseal
from plywise.arena.diagnose.diagnosis import layers_before
from plywise.arena.method import Method
from plywise.arena.methods import find_method
from plywise.arena.run.bench_data import BenchData
from plywise.arena.run.executor import Executor
from plywise.arena.run.job import EVALUATIONS, TrialJob, WorkloadSpec
from plywise.arena.run.ledger import Ledger
from plywise.arena.run.search import SEARCHES, find_search
from plywise.arena.scoring.records import DEFAULTS, FINAL, TUNED, TUNING, Key
from plywise.arena.scoring.score import choose_best, target_of
from plywise.arena.space import defaults
from plywise.data.parts import Data
from plywise.errors import PlywiseError, StateError

TUNING_SEED = 1000
"""Seed of all tuning trials; final runs count theirs from 0, so that none is a run that was chosen by."""

NULL_OFFSET = 500
"""Added to the seeds of a null control, which would repeat its original bit for bit otherwise."""

MATTERING = ("plywise", "torch", "cpu")
"""What of the environment changes times or numbers: where it changes, times are no longer comparable."""


@dataclass(frozen=True)
class BenchConfig:
    """What is compared, and how much of it.

    Attributes:
        entries: the workloads.
        methods: names of the methods.
        trials: points that each method is tuned by; 0: only defaults.
        seeds: final runs of each method on each track.
        device: where trials run.
        search: how the points are found; see `plywise.arena.run.search`.
        threads: torch's threads in each trial.
        patience: seconds that a trial may take; None: what the one who runs them thinks right.
    """

    entries: tuple[WorkloadSpec, ...]
    methods: tuple[str, ...]
    trials: int = 8
    seeds: int = 3
    device: str = "cpu"
    search: str = SEARCHES[0]
    threads: int = 1
    patience: float | None = None

    def __post_init__(self) -> None:
        if not self.entries or not self.methods:
            raise PlywiseError("A bench needs a workload and a method at least.", see="error-bench")
        for kind, names in (("workload", [e.name for e in self.entries]), ("method", list(self.methods))):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise PlywiseError(f"The {kind} {twice!r} is given twice.", see="error-bench")
        if self.trials < 0 or self.seeds < 1:
            raise PlywiseError(
                f"Trials are 0 or more and seeds at least 1, not {self.trials} and {self.seeds}.",
                see="error-bench",
            )
        if self.patience is not None and self.patience <= 0:
            raise PlywiseError(
                f"Patience is in seconds, more than 0, not {self.patience:g}.", see="error-bench"
            )

    @staticmethod
    def saved(fields: dict[str, Any]) -> BenchConfig:
        """The plan whose ``asdict`` was kept as JSON.

        Raises:
            TypeError, ValueError, KeyError: it is none.
        """
        entries = tuple(WorkloadSpec(**entry) for entry in fields["entries"])
        return BenchConfig(**{**fields, "entries": entries, "methods": tuple(fields["methods"])})


@dataclass(frozen=True)
class BenchProgress:
    """A trial has ended: how many have, of how many, and its line."""

    done: int
    total: int
    line: dict[str, Any]


class Bench:
    """A bench in its folder: ``bench.json`` says what, ``trials.jsonl`` what came of it.

    A folder that holds the same plan is gone on with: what is in its ledger is not run again.

    Args:
        plan: what is compared.
        material: the workloads and their data.
        folder: where it is kept.
        command: what was typed, for the report.

    Raises:
        PlywiseError: a method cannot be made or lacks a package, or no method can run on any workload.
            Another process runs the bench in this folder.
        StateError: the folder holds another bench.
    """

    def __init__(self, plan: BenchConfig, material: BenchData, folder: Path, command: str = "") -> None:
        self.plan, self.folder, self._material = plan, folder, material
        self._search = find_search(plan.search)
        self.methods: dict[str, Method] = {name: find_method(name) for name in plan.methods}
        for method in self.methods.values():
            method.require()
        self.workloads = {entry.name: entry.applied(material.workloads[entry.name]) for entry in plan.entries}
        self._entries = {entry.name: entry.settled(self.workloads[entry.name]) for entry in plan.entries}
        self.refused = self._refusals()
        self.about = self._description(command)
        self.ledger = Ledger(folder / "trials.jsonl")
        with self.ledger.writing():
            self._join(folder / "bench.json")

    @property
    def total(self) -> int:
        """Trials of the whole plan, refused ones left out."""
        pairs = [(w, m) for w in self.workloads for m in self.methods if not self._is_refused(w, m)]
        return sum(
            self._tuning(self.methods[m]) + self.plan.seeds * (1 + bool(self._tuning(self.methods[m])))
            for _, m in pairs
        )

    def perform(
        self, crew: Executor, more: Callable[[], bool] = lambda: True
    ) -> Generator[BenchProgress, None, None]:
        """Run what the ledger does not hold yet.

        Args:
            crew: who runs the trials.
            more: asked before each trial; False ends the bench early, for a budget that is spent.
        """
        with self.ledger.writing():
            self.about |= {"workers": crew.count, "threads": crew.threads}
            self._note_environment()
            self._write(self.folder / "bench.json")
            try:
                yield from self._perform(crew, more)
            except (KeyboardInterrupt, GeneratorExit):
                self._finish()
                raise
            self._finish()

    def _note_environment(self) -> None:
        """Add this machine to ``resumed`` if trials are left and the ones before ran on another."""
        known = [self.about["environment"], *self.about.get("resumed", [])]
        now = environment()
        if self.unfinished() and any(known[-1].get(name) != now[name] for name in MATTERING):
            self.about["resumed"] = [*known[1:], now]

    def _perform(self, crew: Executor, more: Callable[[], bool]) -> Iterator[BenchProgress]:
        for name in self.workloads:
            for keys in self._stages(name):
                jobs = [self._job(key) for key in keys if key not in self.ledger]
                for _, line in crew.run(job for job in jobs if more()):
                    self.ledger.add(line)
                    yield BenchProgress(len(self.ledger.lines), self.total, line)
                if any(key not in self.ledger for key in keys):
                    break  # what comes next depends on these

    def _finish(self) -> None:
        """Note in ``bench.json`` what is missing."""
        self.about["unfinished"] = self.unfinished()
        self._write(self.folder / "bench.json")

    def unfinished(self) -> list[str]:
        """What has not been run, a sentence for each workload."""
        missing = []
        for name in self.workloads:
            left = sum(key not in self.ledger for keys in self._stages(name) for key in keys)
            if left or not self._tuned(name):
                missing.append(f"{name}: {left or 'some'} of its trials have not been run.")
        return missing

    # ---- the trials --------------------------------------------------------------------------------

    def _stages(self, name: str) -> Iterator[list[Key]]:
        """A workload's trials: each list is made when the one before has been run."""
        *rounds, last = self._search.rounds(self.plan.trials)
        yield from (self._tuning_trials(name, trials) for trials in rounds)
        yield [*self._tuning_trials(name, last), *self._default_runs(name)]
        yield self._tuned_runs(name)

    def _tuning_trials(self, name: str, trials: range) -> list[Key]:
        """All methods in turn, so that a part is fair, too."""
        return [
            Key(name, method.name, TUNING, TUNED, trial, TUNING_SEED + _offset(method))
            for trial in trials
            for method in self._of(name)
            if trial < self._tuning(method)
        ]

    def _default_runs(self, name: str) -> list[Key]:
        """Final runs of the defaults."""
        return [
            Key(name, method.name, FINAL, DEFAULTS, -1, seed + _offset(method))
            for seed in range(self.plan.seeds)
            for method in self._of(name)
        ]

    def _tuned_runs(self, name: str) -> list[Key]:
        """Final runs of each method's best point."""
        if not self._tuned(name):
            return []
        target = self.target(name)
        best = [(method, choose_best(self._tunings(name, method), target)) for method in self._of(name)]
        return [
            Key(name, method.name, FINAL, TUNED, line["trial"], seed + _offset(method))
            for seed in range(self.plan.seeds)
            for method, line in best
            if line
        ]

    def _job(self, key: Key) -> TrialJob:
        """A trial with its numbers, which may depend on the trials that have been run."""
        file = str(self._material.files[key.workload])
        return TrialJob(key, self._entries[key.workload], self._numbers(key), file, self.plan.device)

    def _numbers(self, key: Key) -> dict[str, float]:
        method = self.methods[key.method]
        if key.purpose == TUNING:
            past = [line for line in self._tunings(key.workload, method) if line["trial"] < key.trial]
            return self._search.numbers(method.space, key.trial, past)
        if key.track == DEFAULTS:
            return defaults(method.space)
        numbers: dict[str, float] = next(
            line["numbers"] for line in self._tunings(key.workload, method) if line["trial"] == key.trial
        )
        return numbers

    def target(self, name: str) -> float | None:
        """A workload's target: its own, or what the baselines' tuning gives."""
        stored = self.workloads[name].target
        if stored is not None:
            return stored
        baselines = [m.name for m in self._of(name) if m.baseline]
        return target_of([line for m in self._of(name) for line in self._tunings(name, m)], baselines)

    def _tunings(self, name: str, method: Method) -> list[dict[str, Any]]:
        kept = self.ledger.lines.items()
        return [line for key, line in kept if key[:3] == (name, method.name, TUNING)]

    def _tuned(self, name: str) -> bool:
        """Whether every tuning trial of a workload has been run."""
        return all(len(self._tunings(name, m)) >= self._tuning(m) for m in self._of(name))

    def _tuning(self, method: Method) -> int:
        """Tuning trials of a method: none if it has nothing to tune."""
        return self.plan.trials if method.space else 0

    def _of(self, name: str) -> list[Method]:
        """The methods that run on a workload."""
        return [method for m, method in self.methods.items() if not self._is_refused(name, m)]

    # ---- who runs on what --------------------------------------------------------------------------

    def _refusals(self) -> list[dict[str, str]]:
        refused = []
        for name, workload in self.workloads.items():
            for m, method in self.methods.items():
                why = method.refuses(workload)
                if why:
                    refused.append({"workload": name, "method": m, "reason": why})
        if len(refused) == len(self.workloads) * len(self.methods):
            raise PlywiseError(
                f"No method can run: {refused[0]['method']}: {refused[0]['reason']}.", see="error-bench"
            )
        return refused

    def _is_refused(self, workload: str, method: str) -> bool:
        return any((one["workload"], one["method"]) == (workload, method) for one in self.refused)

    # ---- what the report says of it ----------------------------------------------------------------

    def _description(self, command: str) -> dict[str, Any]:
        return {
            "title": "plywise bench",
            "command": command,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "environment": environment(),
            "plan": json.loads(json.dumps(asdict(self.plan))),
            "workloads": {
                name: {
                    "about": workload.about,
                    "metric": workload.task.metric_name,
                    "chance": workload.task.chance,
                    "batch_size": workload.batch_size,
                    "steps": workload.steps,
                    "measure_every": max(1, workload.steps // EVALUATIONS),
                    "target": workload.target,
                    "data": self._material.prints[name],
                    **self._material.sizes[name],
                }
                for name, workload in self.workloads.items()
            },
            "methods": {name: _described(method) for name, method in self.methods.items()},
            "trials": self.plan.trials,
            "seeds": list(range(self.plan.seeds)),
            "tracks": [DEFAULTS, TUNED] if self.plan.trials else [DEFAULTS],
            "device": self.plan.device,
            "refused": self.refused,
            "unfinished": [],
        }

    def _join(self, path: Path) -> None:
        """Begin a bench, or go on with the one that is there."""
        if path.exists():
            try:
                before = unseal(path.read_text(encoding="utf-8"))
                planned = json.loads(json.dumps(asdict(BenchConfig.saved(before["plan"]))))
                changed = [
                    name
                    for name, told in self.about["workloads"].items()
                    if not told.items() <= before["workloads"].get(name, {}).items()
                ]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StateError(
                    f"{path} is no description of a bench, or damaged ({error!r}).", see="state-bench"
                ) from error
            if planned != self.about["plan"]:
                difference = _difference(planned, self.about["plan"])
                raise StateError(
                    f"{path.parent} holds another bench: {difference}. Use another --out, or go on with the "
                    "same settings.",
                    see="state-bench",
                )
            if changed:
                raise StateError(
                    f"{path.parent} holds trials on other data or another workload: {changed[0]} has changed "
                    "since, or draws random numbers of its own. Use another --out.",
                    see="state-bench",
                )
            self.about = {**before, "unfinished": []}
        else:
            for name, told in self.about["workloads"].items():
                data = Data.load(self._material.files[name])
                told |= {"repeated": data.repeated(), **layers_before(self.workloads[name], data)}
        self._write(path)

    def _write(self, path: Path) -> None:
        text = json.dumps(self.about, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(path, seal(text) + "\n")


def _offset(method: Method) -> int:
    return NULL_OFFSET if method.null else 0


def _described(method: Method) -> dict[str, Any]:
    return {
        "about": method.about,
        "baseline": method.baseline,
        "null": method.null,
        "gradients": None if method.count else method.gradients,
        "local": method.local,
        "space": {name: asdict(one) for name, one in method.space.items()},
    }


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    key = next(key for key in now if before.get(key) != now[key])
    return f"its {key} are {_short(before.get(key))}, not {_short(now[key])}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(one["name"] if isinstance(one, dict) else str(one) for one in value)
    return str(value)
