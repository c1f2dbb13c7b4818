"""Tunes all arms in the same way and runs them with fresh seeds; each trial is kept as it ends.

An arm is a method on a workload. `Experiment` lists the trials of all arms, leaves out what the ledger
holds, and has an executor run the others. `plywise bench`, `plywise demo` and `plywise reproduce` are
experiments with different arms and a different `Design`; so are the scripts in ``benchmarks/``.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plywise._util.scratch import Scratch
from plywise.arena.method import Method
from plywise.arena.run.config import ObjectSource, ResolvedWorkload
from plywise.arena.run.costs import Cost, Pair, estimate_seconds, measure_costs
from plywise.arena.run.executor import Executor, InlineExecutor
from plywise.arena.run.job import TrialJob
from plywise.arena.run.ledger import Ledger
from plywise.arena.run.search import Search, Sobol
from plywise.arena.scoring.records import DEFAULTS, FINAL, TUNED, TUNING, Key, TrialRecord
from plywise.arena.scoring.score import choose_best
from plywise.arena.scoring.targets import choose_target
from plywise.arena.space import get_defaults
from plywise.arena.workload import Workload

TUNING_SEED = 1000
"""Seed of all tuning trials; final runs have seeds from 0, so that no final run was used for the choice."""

NULL_OFFSET = 500
"""Added to the seeds of a null control, which would repeat its original bit for bit otherwise."""

Choose = Callable[[Sequence[TrialRecord], float | None], TrialRecord | None]
"""A function that chooses the tuning trial for the final runs, from an arm's trials and the target."""


def accept(line: TrialRecord) -> None:
    """Accept every outcome of a trial."""


@dataclass(frozen=True)
class Design:
    """How often each arm is run, and with which numbers.

    Attributes:
        seeds: final runs of each arm on each track.
        trials: tuning trials of an arm that has something to tune and no grid.
        search: finds the numbers of the tuning trials.
        tracks: which final runs there are: with the defaults, and tuned.
        choose: which tuning trial's numbers the tuned runs get.
        chosen: whether each method's default numbers have been tuned before. They are run first, as tuned;
            the tuning trials then only show how much depends on the numbers.
        tuning_seed: seed of all tuning trials.
        tuning_steps: steps of a tuning trial; None: as many as a final run's.
        tuning_every: steps between two measurements of a tuning trial; None: as in a final run.
        null_offset: added to the seeds of null controls.
        check: raises for an outcome that must not be kept.
    """

    seeds: int
    trials: int = 0
    search: Search = field(default_factory=Sobol)
    tracks: tuple[str, ...] = (DEFAULTS, TUNED)
    choose: Choose = choose_best
    chosen: bool = False
    tuning_seed: int = TUNING_SEED
    tuning_steps: int | None = None
    tuning_every: int | None = None
    null_offset: int = NULL_OFFSET
    check: Callable[[TrialRecord], None] = accept

    def count_tuning(self, method: Method) -> int:
        """Tuning trials of a method: none if it has nothing to tune."""
        if method.grid:
            return len(method.grid) if len(method.grid) > 1 else 0
        return self.trials if method.space else 0

    def count_final(self, method: Method) -> int:
        """Final runs of a method, over all tracks."""
        tuned = TUNED in self.tracks and (self.chosen or bool(self.count_tuning(method) or method.grid))
        return self.seeds * ((DEFAULTS in self.tracks) + tuned)

    def seed(self, method: Method, seed: int) -> int:
        """Return the seed of a method's trial: a null control has others than its original."""
        return seed + (self.null_offset if method.null else 0)


@dataclass(frozen=True)
class Progress:
    """After a trial: the number of trials done and in all, its line, and the estimated seconds of the others.

    Without costs that have been measured, ``seconds_left`` is 0.
    """

    done: int
    total: int
    line: TrialRecord
    seconds_left: float = 0.0


class Experiment:
    """The trials of all arms, kept in a ledger.

    Args:
        workloads: by name.
        methods: those that run on each workload, by its name.
        design: how often, and with which numbers.
        ledger: where trials are kept.
        device: where trials run.

    Attributes:
        costs: seconds of a trial by workload and method, from `probe` and from the trials themselves.
    """

    def __init__(
        self,
        workloads: dict[str, ResolvedWorkload],
        methods: Mapping[str, Sequence[Method]],
        design: Design,
        ledger: Ledger,
        device: str = "cpu",
    ) -> None:
        self.workloads, self.methods, self.design = workloads, methods, design
        self.ledger, self.device = ledger, device
        self.costs: dict[Pair, Cost] = {}
        self._pairs = {(name, method.name): method for name, ms in methods.items() for method in ms}

    # ---- running -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Trials of all arms."""
        design = self.design
        return sum(design.count_tuning(m) + design.count_final(m) for m in self._pairs.values())

    @property
    def done(self) -> int:
        """Those that the ledger holds."""
        return self._count_kept().total()

    def run(
        self, executor: Executor, more: Callable[[], bool] = lambda: True
    ) -> Generator[Progress, None, None]:
        """Run the trials that the ledger does not hold, within `Ledger.writing`.

        Args:
            executor: runs the trials.
            more: asked before each trial; False ends the experiment early, for a budget that is spent.
        """
        for name in self.workloads:
            for keys in self._list_stages(name):
                jobs = [self.job(key) for key in keys if key not in self.ledger]
                for _, line in executor.run(job for job in jobs if more()):
                    self.design.check(line)
                    self.ledger.add(line)
                    self._note_cost(line, executor.start_s)
                    left = self.seconds_left(executor.count)
                    yield Progress(self.done, self.total, line, left)
                if any(key not in self.ledger for key in keys):
                    break  # what comes next depends on these

    def probe(self, executor: Executor, arms: Collection[Pair] | None = None) -> dict[Pair, str]:
        """Measure what a few steps of each arm cost; returns why arms failed.

        Args:
            executor: runs them.
            arms: workloads and methods; None: all.
        """
        pairs = self._pairs if arms is None else arms
        probes = (self.job(Key(*pair, FINAL, DEFAULTS, -1, 0), probe=True) for pair in pairs)
        costs, failures = measure_costs(probes, self.workloads, executor)
        self.costs |= costs
        return failures

    def seconds_left(self, workers: int) -> float:
        """Estimate the seconds of the remaining trials by the arms' costs; 0 if none is known."""
        design, kept = self.design, self._count_kept()
        steps = {name: resolved.workload.steps for name, resolved in self.workloads.items()}
        short = {name: design.tuning_steps or count for name, count in steps.items()}
        final = {pair: design.count_final(m) - kept[*pair, FINAL] for pair, m in self._pairs.items()}
        tuning = {pair: design.count_tuning(m) - kept[*pair, TUNING] for pair, m in self._pairs.items()}
        return estimate_seconds(final, self.costs, steps, workers) + estimate_seconds(
            tuning, self.costs, short, workers
        )

    def unfinished(self) -> dict[str, int | None]:
        """Return how many trials of each workload have not been run; None where that is not known yet."""
        missing: dict[str, int | None] = {}
        for name in self.workloads:
            left = sum(key not in self.ledger for keys in self._list_stages(name) for key in keys)
            if left or not self._is_tuned(name):
                missing[name] = left or None
        return missing

    def job(self, key: Key, *, probe: bool = False) -> TrialJob:
        """Return a trial with its numbers, which may depend on the trials that have been run."""
        workload = self.workloads[key.workload]
        tuning = key.purpose == TUNING
        return TrialJob(
            key,
            workload.source,
            dict(self._choose_numbers(key)),
            str(workload.file),
            self.device,
            steps=self.design.tuning_steps if tuning else None,
            measure_every=self.design.tuning_every if tuning else None,
            probe=probe,
        )

    # ---- which trials ------------------------------------------------------------------------------

    def _list_stages(self, name: str) -> Iterator[list[Key]]:
        """Yield a workload's trials: each list is made when the one before has been run."""
        design = self.design
        most = max(map(design.count_tuning, self.methods[name]), default=0)
        *rounds, last = design.search.rounds(most)
        if design.chosen:
            yield self._list_final_runs(name, TUNED, {method.name: -1 for method in self.methods[name]})
        yield from (self._list_tuning_trials(name, trials) for trials in rounds)
        usual = DEFAULTS in design.tracks
        default_runs = {method.name: -1 for method in self.methods[name] if usual}
        yield [*self._list_tuning_trials(name, last), *self._list_final_runs(name, DEFAULTS, default_runs)]
        if TUNED in design.tracks and not design.chosen and self._is_tuned(name):
            yield self._list_final_runs(name, TUNED, self._choose_trials(name))

    def _list_tuning_trials(self, name: str, trials: range) -> list[Key]:
        """List the tuning trials, all methods in turn, so that an unfinished bench is fair, too."""
        design = self.design
        return [
            Key(name, method.name, TUNING, TUNED, trial, design.seed(method, design.tuning_seed))
            for trial in trials
            for method in self.methods[name]
            if trial < design.count_tuning(method)
        ]

    def _list_final_runs(self, name: str, track: str, trials: Mapping[str, int]) -> list[Key]:
        """All methods with a seed, then with the next; ``trials`` has the number of each one's point."""
        return [
            Key(name, method.name, FINAL, track, trials[method.name], self.design.seed(method, seed))
            for seed in range(self.design.seeds)
            for method in self.methods[name]
            if method.name in trials
        ]

    def _choose_trials(self, name: str) -> dict[str, int]:
        """Each method's best point; a grid of one point needs no tuning."""
        target, found = self.target(name), {}
        for method in self.methods[name]:
            best = self.design.choose(self.tuning(name, method.name), target)
            if best:
                found[method.name] = best["trial"]
            elif len(method.grid) == 1:
                found[method.name] = 0
        return found

    def _choose_numbers(self, key: Key) -> Mapping[str, float]:
        method = self._pairs[key.workload, key.method]
        if key.trial < 0:
            return get_defaults(method.space) or dict(next(iter(method.grid), {}))
        if method.grid:
            return method.grid[key.trial]
        past = self.tuning(key.workload, key.method)
        if key.purpose == TUNING:
            earlier = [line for line in past if line["trial"] < key.trial]
            return self.design.search.numbers(method.space, key.trial, earlier)
        return next(line["numbers"] for line in past if line["trial"] == key.trial)

    # ---- what the ledger holds ---------------------------------------------------------------------

    def target(self, name: str) -> float | None:
        """Return a workload's target: its own, or what the baselines' tuning gives."""
        stored = self.workloads[name].workload.target
        if stored is not None:
            return stored
        baselines = [method.name for method in self.methods[name] if method.baseline]
        return choose_target(
            (line for m in self.methods[name] for line in self.tuning(name, m.name)), baselines
        )

    def lines(self, workload: str, method: str) -> list[TrialRecord]:
        """An arm's trials that the ledger holds, by point and seed; runs of more seeds do not count."""
        return [
            self.ledger.lines[key] for key in sorted(self._list_kept_keys()) if key[:2] == (workload, method)
        ]

    def tuning(self, workload: str, method: str) -> list[TrialRecord]:
        """Return an arm's tuning trials that the ledger holds."""
        return [line for line in self.lines(workload, method) if line["purpose"] == TUNING]

    def _note_cost(self, line: TrialRecord, start_s: float) -> None:
        """Take the cost of a full trial in place of the estimate from its first steps."""
        pair = line["workload"], line["method"]
        whole = line["purpose"] == FINAL or self.design.tuning_steps is None
        if whole and pair in self.costs and line["steps"] and line["steps"][-1]:
            self.costs[pair] = Cost(line["wall"][-1] / line["steps"][-1], start_s + line["measuring"])

    def _is_tuned(self, name: str) -> bool:
        """Return whether every tuning trial of a workload has been run."""
        return all(len(self.tuning(name, m.name)) >= self.design.count_tuning(m) for m in self.methods[name])

    def _list_kept_keys(self) -> Iterator[Key]:
        """Trials of the ledger that are this experiment's; another one may have had more seeds."""
        for key in self.ledger.lines:
            method = self._pairs.get((key.workload, key.method))
            if method and (key.purpose == TUNING or key.seed < self.design.seed(method, self.design.seeds)):
                yield key

    def _count_kept(self) -> Counter[tuple[str, str, str]]:
        """Return how many trials of each workload, method and purpose the ledger holds."""
        return Counter((key.workload, key.method, key.purpose) for key in self._list_kept_keys())


def run_arms(
    workload: Workload, methods: Sequence[Method], design: Design, ledger: Ledger | None = None
) -> Experiment:
    """Run methods that are objects, not addresses, on a workload, in this process.

    Args:
        workload: what they are compared on.
        methods: what is compared.
        design: how often each is run, and with which numbers.
        ledger: where trials are kept; what it holds is not run again. None: in memory.
    """
    source = ObjectSource(workload, {method.name: method for method in methods})
    with Scratch() as scratch:
        resolved = ResolvedWorkload.write(source, workload, scratch.path / "data.pt")
        arms = {source.name: resolved}, {source.name: methods}
        experiment = Experiment(*arms, design, ledger or Ledger())
        with experiment.ledger.writing():
            for _ in experiment.run(InlineExecutor()):
                pass
    return experiment
