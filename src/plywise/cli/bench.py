"""`plywise bench`: which method is best on your model, within your hours."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from plywise._util.environment import workers_for
from plywise._util.files import refuse_file
from plywise._util.progress import format_duration
from plywise._util.words import split_words
from plywise.arena.methods import USUAL
from plywise.cli.console import VOLUME, notes
from plywise.cli.interrupt import Stop
from plywise.cli.training import Switch
from plywise.errors import BenchError, CommandError, StateError

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.arena.run.bench import Bench
    from plywise.arena.run.config import BenchConfig, ResolvedBench, WorkloadSpec
    from plywise.arena.run.executor import Executor
    from plywise.arena.run.ledger import Ledger

METHODS = ",".join(USUAL)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags that are part of a bench's plan: with --resume, the folder says them.

    Attributes:
        data: module:name of a function that returns (x, y), (x, y, x_test, y_test) or three pairs for
            training, validation and test, where a Dataset, a DataLoader or an iterable of batches may stand
            for a pair, or a dict with the keys train, validation and test; a .npz file with x_train, y_train
            and perhaps x_test, y_test; a .csv or .parquet file whose last column is the target; or a folder
            of images, a folder for each class.
        read: how the data are read, where plywise would guess: header=yes or no and target=NAME (a column)
            for a .csv file, targets=classes or numbers, inputs=numbers, images or tokens; put commas between.
        workloads: instead of a model: quick, standard, related, or names of workloads that plywise ships; or
            hidden: five small workloads made by a seed, on which no default was tuned.
        hidden_seed: seed of the hidden workloads. Default: a new one.
        methods: what is compared: names (`plywise methods` lists the rules), rule+optimizer, learners, or
            module:name of a torch.optim.Optimizer or of a rule
            of yours.
        trials: tuning trials of each method, without a budget; 0: defaults only, with a budget, too.
        search: how the numbers of tuning trials are chosen. sobol: the same quasi-random points for all
            methods, which gives all the same chances; optuna: Optuna's TPE, which learns from a method's
            earlier trials (pip install 'plywise[optuna]').
        seeds: final runs of each method on each track.
        steps: steps of a run. Default: the workload's; for your model what fits the budget, or 1000.
        batch_size: samples a batch. Default: the workload's; 128 for your model.
        loss: function of outputs and targets, as module:name. Default: cross entropy for classes, squared
            error for numbers.
        metric: the metric to compare by, the lower the better, as module:name. Default: error rate, or the
            loss. With --step a function of a model and a batch.
        step: function of a model and a batch of your data to the loss, as module:name, for models and batches
            of any kind. Default: a dict is given by name and a tuple by place, and a loss that the model
            returns is taken.
        keep_batches: batches that are kept of a stream (a DataLoader, an iterable). Default: 1000.
        blocks: blocks that local learners cut your model into. Default: 4, or as many as it has.
        threads: torch's threads in each trial.
        device: where it trains, as in cuda.
        timeout_s: seconds that one trial may take. Default: 600; with a budget, three times what the slowest
            trial is planned to take, if that is more.
    """

    data: str | None = None
    read: str = ""
    workloads: str | None = None
    hidden_seed: int | None = None
    methods: str = METHODS
    trials: int = 8
    search: str = "sobol"
    seeds: int = 3
    steps: int | None = None
    batch_size: int | None = None
    loss: str = ""
    metric: str = ""
    step: str = ""
    keep_batches: int | None = None
    blocks: int | None = None
    threads: int = 1
    device: str = "cpu"
    timeout_s: Annotated[float | None, Parameter(alias="--patience")] = None


def bench(
    model: str | None = None,
    *,
    flags: Flags | None = None,
    budget: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    out: Path = Path("runs/bench"),
    resume: Switch = False,
    dry_run: Switch = False,
    json: Switch = False,
) -> int:
    """Compare training methods on your model, with equal tuning for all, and write a report.

    Each method runs once with its defaults and once tuned by the same number of trials, and then again with
    fresh seeds. What counts is the time to a target on validation data; the test data are read once, at the
    end. A run that does not reach the target, or fails before, counts as a miss. Ctrl-C loses the running
    trials only.

    For example:

        plywise bench my.module:make_model --data my.module:make_data --budget 2h
        plywise bench mine:model --data table.csv --methods adamw,muon,proxprop
        plywise bench mine:model --data my.npz --methods adamw,mine:MyOptimizer

        # four small workloads of ours, in minutes
        plywise bench --workloads quick
        # go on with what was interrupted
        plywise bench --resume

    Args:
        model: function that makes your network, as module:name.
        flags: what is compared, and how much of it.
        budget: time for all of it, as in 90s, 45m, 2h: sets the number of trials, and the steps of your model
            if you do not.
        workers: trials at once. Default: the cores over the threads; 1 on a GPU.
        ray: run the trials on a Ray cluster: its address as host:port, auto for the one that this machine is
            part of, or local to start one here (pip install 'plywise[ray]').
        out: folder of bench.json, trials.jsonl and report.html.
        resume: go on with the bench in that folder; what is compared, and how, is as it was there.
        dry_run: say how long it, or with --resume the rest of it, will take, and stop.
        json: print ranking and findings as JSON; progress goes to standard error.
    """
    from plywise.arena.run.budget import parse_duration
    from plywise.arena.run.config import resolve_bench
    from plywise.arena.run.ledger import Ledger

    seconds = None if budget is None else parse_duration(budget)
    end = None if seconds is None else time.monotonic() + seconds
    flags = flags or Flags()
    _check_folder(out, resume, model, flags)
    config = _read_config(out) if resume else _make_config(model, flags)
    executor = _make_executor(ray, workers, config)
    screen = notes(apart=json)
    with resolve_bench(config, out) as resolved:
        for guess in resolved.guesses:
            screen.print(guess)
        if resume and dry_run:
            _plan(resolved, executor, None, Ledger(out / "trials.jsonl"), screen)
        elif not resume and (dry_run or seconds is not None):
            resolved = resolved.with_config(_plan(resolved, executor, seconds, Ledger(), screen))
            executor.timeout_s = resolved.config.trial_limit_s
        if not dry_run and not _run(resolved, executor, out, end, screen, json):
            return 1
    return 0


def _check_folder(out: Path, resume: bool, model: str | None, flags: Flags) -> None:
    """Refuse a folder with a bench unless --resume is given, and one without a bench if it is."""
    refuse_file(out)
    if resume:
        _refuse_settings(out, model, flags)
    elif (out / "bench.json").exists():
        raise BenchError(
            f"{out} holds a bench. Add --resume to go on with it, or name another folder with --out."
        )


def _refuse_settings(out: Path, model: str | None, flags: Flags) -> None:
    """Refuse flags of the plan with --resume."""
    changed = [field.name for field in fields(flags) if getattr(flags, field.name) != field.default]
    names = ["the model"] * (model is not None) + [f"--{name.replace('_', '-')}" for name in changed]
    if names:
        raise CommandError(
            f"--resume goes on with the bench in {out} as it was planned: leave out {', '.join(names)}, or "
            "name another folder with --out and begin a bench of its own."
        )


def _make_config(model: str | None, flags: Flags) -> BenchConfig:
    from plywise.arena.run.config import BenchConfig

    same = ("trials", "seeds", "device", "search", "threads", "timeout_s")
    return BenchConfig(
        tuple(_make_specs(model, flags)),
        tuple(split_words(flags.methods)),
        **{name: getattr(flags, name) for name in same},
    )


def _make_specs(model: str | None, flags: Flags) -> list[WorkloadSpec]:
    from plywise.arena.run.config import WorkloadSpec
    from plywise.arena.workloads import list_workloads

    if (model is None) == (flags.workloads is None):
        raise CommandError(
            "Say what to train: your model as module:name with --data, or --workloads with quick, standard, "
            "related, hidden or names."
        )
    changes: dict[str, Any] = {name: getattr(flags, name) for name in ("batch_size", "steps", "blocks")}
    own = {name: getattr(flags, name) for name in ("read", "loss", "metric", "step", "keep_batches")}
    if model is not None:
        if flags.hidden_seed is not None:
            raise CommandError("--hidden-seed belongs to --workloads hidden.")
        if flags.data is None:
            raise CommandError(f"Say with --data where the data for {model} are.")
        return [WorkloadSpec(model, model, flags.data, **own, **changes)]
    if flags.data is not None or any(own.values()):
        raise CommandError(
            "--data, --read, --loss, --metric, --step and --keep-batches belong to a model of your own."
        )
    return [
        WorkloadSpec(name, **changes) for name in list_workloads(flags.workloads or "", flags.hidden_seed)
    ]


def _make_executor(ray: str | None, workers: int | None, config: BenchConfig) -> Executor:
    """Runs the trials: on this machine, or on a cluster, whose machines have devices of their own."""
    threads, timeout_s = config.threads, config.trial_limit_s
    if ray is None:
        from plywise.arena.run.executor import ProcessExecutor
        from plywise.arena.run.job import require_device

        require_device(config.device)
        count = workers_for(config.device, threads) if workers is None else workers
        return ProcessExecutor(count, threads, timeout_s)
    if workers is not None:
        raise CommandError("--workers belongs to this machine; with --ray, the cluster's CPUs say how many.")
    from plywise.arena.run.ray_executor import RayExecutor

    return RayExecutor(ray, threads, timeout_s)


def _read_config(out: Path) -> BenchConfig:
    from plywise._util.file_errors import require_file
    from plywise._util.sealed import unseal
    from plywise.arena.run.config import BenchConfig

    path = out / "bench.json"
    if not path.exists():
        raise BenchError(f"{out} holds no bench to resume: there is no {path}.")
    try:
        return BenchConfig.from_json(unseal(require_file(path).read_text(encoding="utf-8"))["plan"])
    except (ValueError, KeyError, TypeError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise StateError(
            f"{path} is not a description of a bench, or it was damaged or edited: {why}. Bring back the "
            "file as it was, or begin a bench in another --out.",
            see="state-bench",
        ) from error


def _plan(
    resolved: ResolvedBench,
    executor: Executor,
    budget: float | None,
    ledger: Ledger,
    screen: Console,
) -> BenchConfig:
    """Choose steps and trials that fit the budget, and say how long the bench, or its rest, will take."""
    from plywise.arena.run.bench import make_experiment
    from plywise.arena.run.budget import fit_config

    screen.print("Measuring a few steps of each method.", style="dim")
    experiment = make_experiment(resolved, ledger)
    failures = experiment.probe(executor)
    for (workload, method), why in failures.items():
        screen.print(f"{method} fails on {workload}: {why}", style="red")
    if len(failures) == len(experiment.costs):
        raise BenchError("Every method fails in its first steps; nothing has been run.")
    config = fit_config(resolved, experiment.costs, executor.count, budget)
    planned = make_experiment(resolved.with_config(config), ledger)
    planned.costs = experiment.costs
    needed, done = planned.seconds_left(executor.count), planned.done
    steps = ", ".join(f"{name} {w.workload.steps}" for name, w in planned.workloads.items())
    screen.print(
        f"With {config.trials} tuning trials and {config.seeds} seeds for each method, and these steps: "
        f"{steps}; {executor.count} at once: about {format_duration(needed)}"
        + (f" for what is left; {done} trials are done." if done else ".")
    )
    return config


def _run(
    resolved: ResolvedBench,
    executor: Executor,
    out: Path,
    end: float | None,
    screen: Console,
    json: bool,
) -> bool:
    """Run the trials and draw the report; return whether any final run succeeded, or none was due."""
    from plywise.arena.reports.progress import show_trials
    from plywise.arena.run.bench import Bench
    from plywise.cli.report import conclude

    bench = Bench(resolved, out, shlex.join(["plywise", *sys.argv[1:]]))
    goes_on = f"`plywise bench --resume --out {shlex.quote(str(out))}` goes on."
    stop = Stop(executor)
    try:
        # closed at once if interrupted here, so that the bench ends before it is reported
        with stop, closing(bench.run(executor, lambda: stop.more(end))) as pieces:
            _announce(bench, screen)
            show_trials(pieces, bench, screen, VOLUME.verbose)
    except OSError as error:  # as of a disk that is full
        error.add_note(f"{len(bench.ledger.lines)} of {bench.total} trials are kept. {goes_on}")
        raise
    except KeyboardInterrupt:
        kept = f"{len(bench.ledger.lines)} of {bench.total} trials are kept"
        with suppress(KeyboardInterrupt):
            if stop.presses < 2:
                conclude(out, json)
                kept += f"; {out / 'report.html'} shows them"
        raise KeyboardInterrupt(f"{kept}. {goes_on}") from None
    results = conclude(out, json).results
    if bench.about["unfinished"]:
        screen.print(
            f"The budget is spent: {len(bench.ledger.lines)} of {bench.total} trials have been run. {goes_on}"
        )
    return len(results.failed) < len(results.workloads)


def _announce(bench: Bench, screen: Console) -> None:
    config = bench.resolved.config
    screen.print(
        f"Methods: {len(config.methods)}; workloads: {len(config.workloads)}; tuning trials of each: "
        f"{config.trials}; seeds: {config.seeds}; trials in all: {bench.total}, "
        f"{len(bench.ledger.lines)} done."
    )
    hidden = [name for name in bench.resolved.workloads if name.startswith("hidden-")]
    if hidden:
        seed = hidden[0].rpartition("-")[2]
        screen.print(f"Hidden workloads of seed {seed}: --hidden-seed {seed} makes the same again.")
    for (workload, method), reason in bench.resolved.refused.items():
        screen.print(f"{method} does not run on {workload}: {reason}.")
