"""A bench in its folder: ``bench.json`` says what is compared, ``trials.jsonl`` holds the trials."""

import json
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plywise._util.environment import environment
from plywise._util.file_errors import require_file
from plywise._util.files import remove_unfinished, write_whole
from plywise._util.sealed import seal, unseal
from plywise.arena.diagnostics.diagnosis import layers_before
from plywise.arena.method import Method
from plywise.arena.run.config import BenchConfig, ResolvedBench, ResolvedWorkload
from plywise.arena.run.executor import Executor
from plywise.arena.run.experiment import Design, Experiment, Progress
from plywise.arena.run.ledger import Ledger
from plywise.arena.run.search import find_search
from plywise.arena.scoring.records import DEFAULTS, TUNED
from plywise.arena.scoring.summary import BenchSummary, summarize_bench
from plywise.data.parts import Data
from plywise.errors import StateError

MATTERING = ("plywise", "torch", "cpu")
"""Fields of the environment that change times or numbers: if one differs, times are not comparable."""


def make_experiment(resolved: ResolvedBench, ledger: Ledger, design: Design | None = None) -> Experiment:
    """Return the trials of a bench.

    Args:
        resolved: what is compared.
        ledger: where its trials are kept.
        design: how often each method is run; None: as the config says.
    """
    config = resolved.config
    usual = Design(seeds=config.seeds, trials=config.trials, search=find_search(config.search))
    return Experiment(resolved.workloads, resolved.running, design or usual, ledger, config.device)


class Bench:
    """A bench in its folder. A folder that holds the same config is resumed: nothing is run twice.

    Args:
        resolved: what is compared.
        folder: where it is kept.
        command: what was typed, for the report.
        design: how often each method is run; None: as the config says.
        about: further fields of bench.json.

    Attributes:
        experiment: its trials.
        about: what bench.json holds.

    Raises:
        PlywiseError: another process runs the bench in this folder.
        StateError: the folder holds another bench.
    """

    def __init__(
        self,
        resolved: ResolvedBench,
        folder: Path,
        command: str = "",
        design: Design | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.resolved, self.folder = resolved, folder
        self.ledger = Ledger(folder / "trials.jsonl")
        self.experiment = make_experiment(resolved, self.ledger, design)
        self.about = {**self._describe(command), **(about or {})}
        with self.ledger.writing():
            self._join(folder / "bench.json")

    @property
    def total(self) -> int:
        """Trials of the whole bench, refused ones left out."""
        return self.experiment.total

    def run(
        self, executor: Executor, more: Callable[[], bool] = lambda: True
    ) -> Generator[Progress, None, None]:
        """Run what the ledger does not hold yet.

        Args:
            executor: runs the trials.
            more: asked before each trial; False ends the bench early, for a budget that is spent.
        """
        with self.ledger.writing():
            self.about |= {"workers": executor.count, "threads": executor.threads}
            self._note_environment()
            self._write()
            try:
                yield from self.experiment.run(executor, more)
            except (KeyboardInterrupt, GeneratorExit):
                self._finish()
                raise
            self._finish()

    def _finish(self) -> None:
        """Write into ``bench.json`` what is missing."""
        self.about["unfinished"] = left = self.unfinished()
        self.about["expected"] = self.total if left else self.experiment.done
        self._write()

    def unfinished(self) -> list[str]:
        """Say what has not been run, in a sentence for each workload."""
        missing = self.experiment.unfinished().items()
        return [f"{name}: {left or 'some'} of its trials have not been run." for name, left in missing]

    def summarize(self) -> BenchSummary:
        """Score the trials that there are."""
        return summarize_bench(self.about, self.ledger.lines.values())

    def _note_environment(self) -> None:
        """Add this machine to ``resumed`` if trials are left and the ones before ran on another."""
        known = [self.about["environment"], *self.about.get("resumed", [])]
        now = environment()
        if self.unfinished() and any(known[-1].get(name) != now[name] for name in MATTERING):
            self.about["resumed"] = [*known[1:], now]

    def _describe(self, command: str) -> dict[str, Any]:
        config = self.resolved.config
        return {
            "title": "plywise bench",
            "command": command,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "environment": environment(),
            "plan": _as_json(config),
            "workloads": {name: _describe_workload(w) for name, w in self.resolved.workloads.items()},
            "methods": {name: _describe_method(method) for name, method in self.resolved.methods.items()},
            "trials": config.trials,
            "seeds": list(range(config.seeds)),
            "tracks": [DEFAULTS, TUNED] if config.trials else [DEFAULTS],
            "device": config.device,
            "refused": [
                {"workload": name, "method": method, "reason": reason}
                for (name, method), reason in self.resolved.refused.items()
            ],
            "unfinished": [],
            "expected": self.total,
        }

    def _join(self, path: Path) -> None:
        """Start a bench, or resume the one in the folder."""
        remove_unfinished(path)
        if path.exists():
            self.about = {"expected": self.total, **self._read_same(path), "unfinished": []}
        else:
            for name, about in self.about["workloads"].items():
                resolved = self.resolved.workloads[name]
                data = Data.load(resolved.file)
                about |= {"repeated": data.count_repeated(), "guesses": list(resolved.workload.guesses)}
                about |= layers_before(resolved.workload, data)
        self._write()

    def _read_same(self, path: Path) -> dict[str, Any]:
        """Return what bench.json holds, if it is of this bench."""
        try:
            before: dict[str, Any] = unseal(require_file(path).read_text(encoding="utf-8"))
            config = _as_json(BenchConfig.from_json(before["plan"]))
            changed = [
                name
                for name, about in self.about["workloads"].items()
                if not about.items() <= before["workloads"].get(name, {}).items()
            ]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StateError(
                f"{path} is not a description of a bench, or damaged ({error!r}).", see="state-bench"
            ) from error
        if config != self.about["plan"]:
            raise StateError(
                f"{path.parent} holds another bench: {_difference(config, self.about['plan'])}. Use another "
                "--out, or go on with the same settings.",
                see="state-bench",
            )
        if changed:
            raise StateError(
                f"{path.parent} holds trials on other data or another workload: {changed[0]} has changed "
                "since, or draws random numbers of its own. Use another --out.",
                see="state-bench",
            )
        return before

    def _write(self) -> None:
        text = json.dumps(self.about, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / "bench.json", seal(text) + "\n")


def _as_json(config: BenchConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _describe_workload(resolved: ResolvedWorkload) -> dict[str, Any]:
    workload = resolved.workload
    return {
        "about": workload.about,
        "metric": workload.task.metric_name,
        "chance": workload.task.chance,
        "batch_size": workload.batch_size,
        "steps": workload.steps,
        "measure_every": workload.interval,
        "target": workload.target,
        "data": resolved.digest,
        **resolved.sizes,
    }


def _describe_method(method: Method) -> dict[str, Any]:
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
    return f"its {key} are {_shorten(before.get(key))}, not {_shorten(now[key])}"


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(item["name"] if isinstance(item, dict) else str(item) for item in value)
    return str(value)
