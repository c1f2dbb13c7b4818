"""The arena from Python: `bench`, `diagnose` and `load`."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.environment import workers_for
from plywise._util.file_errors import explaining_files
from plywise._util.import_path import refuse_while_importing
from plywise._util.words import split_words
from plywise.arena.arguments import refuse_wrong_kinds
from plywise.arena.diagnostics.advice import advice
from plywise.arena.diagnostics.diagnosis import diagnose_workload
from plywise.arena.given import is_given, name_data, name_object, shorten, shorten_errors
from plywise.arena.method import Method
from plywise.arena.methods import USUAL
from plywise.arena.reports.bench_page import load_summary
from plywise.arena.reports.notebook import BenchReport, DiagnosisReport
from plywise.arena.reports.progress import show_trials
from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import Executor, InlineExecutor, ProcessExecutor
from plywise.arena.run.job import require_device
from plywise.arena.workloads import find_workload, list_workloads
from plywise.arena.workloads.own import own_workload
from plywise.engine.rule import Rule
from plywise.errors import AddressError, BenchError

Factory = Callable[[], nn.Module] | str
"""A function that makes a new network each time, or ``module:name`` of one."""
Judge = Callable[[Tensor, Tensor], Tensor] | str
"""A function of outputs and targets, or ``module:name`` of one."""
Entry = str | type[Optimizer] | type[Rule] | Method
"""A method: its name or address, or the class itself."""


@shorten_errors()
@explaining_files()
@refuse_wrong_kinds
def bench(
    model: Factory | None = None,
    data: Any = None,
    *,
    workloads: str | Sequence[str] = (),
    hidden_seed: int | None = None,
    methods: str | Sequence[Entry] = USUAL,
    trials: int = 8,
    seeds: int = 3,
    steps: int | None = None,
    batch_size: int | None = None,
    loss: Judge = "",
    metric: Judge = "",
    step: Callable[..., Tensor] | str = "",
    blocks: int | None = None,
    read: str = "",
    keep_batches: int | None = None,
    search: str = "sobol",
    device: str | torch.device = "cpu",
    threads: int = 1,
    workers: int | None = None,
    timeout_s: float | None = None,
    out: str | Path = "runs/bench",
    progress: bool = True,
) -> BenchReport:
    """Compare training methods on your model, with equal tuning for all: `plywise bench` from Python.

    The folder keeps every trial as it ends. The same call continues an interrupted bench, and ``plywise
    report`` writes its page.

    If models, data or methods are objects (functions, classes, tensors), trials run in this process, one
    after the other. If all are given by address, each trial runs in its own process, several at once; such a
    process does not run your script again, so a script needs no ``if __name__ == "__main__":``.

    Args:
        model: function that makes your network, a new one each time; or its address.
        data: ``(x, y)``, ``(x, y, x_test, y_test)`` or three pairs for training, validation and test; a
            function that returns these; or what ``plywise bench --data`` takes.
        workloads: instead of a model: ``"quick"``, ``"standard"``, ``"related"``, or names of workloads that
            plywise ships; or ``"hidden"``: workloads made by a seed, on which no default was tuned.
        hidden_seed: seed of the hidden workloads. Default: a new one.
        methods: what to compare: names, addresses, classes of `torch.optim.Optimizer` or of `plywise.Rule`,
            and `plywise.arena.method.Method` objects; or names in one string, with commas between them.
        trials: tuning trials of each method; 0: defaults only.
        seeds: final runs of each method on each track.
        steps: steps of a run. Default: the workload's; 1000 for your model.
        batch_size: samples a batch. Default: the workload's; 128 for your model.
        loss: function of outputs and targets. Default: cross entropy for classes, squared error for numbers.
        metric: the metric to compare by, the lower the better. Default: error rate, or the loss.
        step: a function of the model and a batch that returns the loss, for models with another calling
            convention; as ``plywise bench --step``.
        blocks: blocks that local learners cut your model into.
        read: how the data are read, where plywise would guess; see ``plywise bench --help``.
        keep_batches: batches that are kept of a stream; see ``plywise bench --help``.
        search: how the numbers of the tuning trials are found: ``"sobol"`` or ``"optuna"``.
        device: where it trains.
        threads: torch's threads in each trial.
        workers: trials at once, for what is given by addresses. Default: the cores over the threads.
        timeout_s: seconds that a trial may take, in a process of its own. Default 600.
        out: folder of bench.json and trials.jsonl.
        progress: show each trial as it ends.

    Returns:
        The report: print it, show it in a notebook, `BenchReport.plot`, `BenchReport.to_dataframe`.

    Raises:
        PlywiseError: there is no such method or workload, or model, data and loss do not fit one another.
        StateError: the folder holds another bench.
    """
    given = {"batch_size": batch_size, "steps": steps, "blocks": blocks}
    functions = {"loss": loss, "metric": metric, "step": step}
    own: dict[str, Any] = {role: name_object(function, role) for role, function in functions.items()}
    own |= {"read": read, "keep_batches": keep_batches}
    config = BenchConfig(
        tuple(_make_specs(model, data, workloads, hidden_seed, own, given)),
        _name_methods(methods),
        trials=trials,
        seeds=seeds,
        device=str(device),
        search=search,
        threads=threads,
        timeout_s=timeout_s,
    )
    return _run_bench(config, _make_executor(config, workers), Path(out), _make_screen(progress))


@explaining_files()
@refuse_wrong_kinds
def load(folder: str | Path) -> BenchReport:
    """Load a bench, finished or not, from the folder of `bench` or ``plywise bench``.

    Raises:
        PlywiseError: the folder holds no bench.
    """
    return BenchReport(Path(folder), load_summary(Path(folder)))


@shorten_errors()
@explaining_files()
@refuse_wrong_kinds
def diagnose(
    model: Factory | None = None,
    data: Any = None,
    *,
    workload: str | None = None,
    batches: int = 8,
    batch_size: int | None = None,
    loss: Judge = "",
    step: Callable[..., Tensor] | str = "",
    read: str = "",
    keep_batches: int | None = None,
    seed: int = 0,
) -> DiagnosisReport:
    """Examine a model's layers for a few batches, and recommend a rule, with reason and certainty.

    Nothing is trained: the model is examined at initialisation. This is `plywise diagnose` from Python.

    Args:
        model: as for `bench`.
        data: as for `bench`.
        workload: instead of a model: name of a workload that plywise ships.
        batches: how many batches of the training part are looked at.
        batch_size: samples a batch. Default: the workload's; 128 for your model.
        loss: as for `bench`.
        step: as for `bench`.
        read: as for `bench`.
        keep_batches: as for `bench`.
        seed: of the weights and of which samples are looked at.

    Raises:
        PlywiseError: model, data and loss do not fit one another, or are not given.
    """
    if (model is None) == (workload is None) or (model is not None and data is None):
        raise BenchError("Give a model with data, or the name of a workload.")
    if workload is not None:
        found, subject = find_workload(workload), f"--workloads {workload}"
    else:
        address, source = name_object(model, "model"), name_data(data)
        judge, called = name_object(loss, "loss"), name_object(step, "step")
        how: dict[str, Any] = {"read": read, "loss": judge, "step": called, "keep_batches": keep_batches}
        found = own_workload(address, address, source, **how, blocks=0)
        subject = shlex.join([address, "--data", source])
    seen = diagnose_workload(found, found.make_data(), batches=batches, batch_size=batch_size, seed=seed)
    return DiagnosisReport(seen, advice(seen, subject), [shorten(guess) for guess in found.guesses])


def _run_bench(config: BenchConfig, executor: Executor, folder: Path, screen: Any) -> BenchReport:
    refuse_while_importing("plywise.arena.bench")
    with resolve_bench(config, folder) as resolved:
        made = Bench(resolved, folder, "plywise.arena.bench(...)")
        for guess in resolved.guesses:
            screen.print(shorten(guess))
        with closing(made.run(executor)) as pieces:
            show_trials(pieces, made, screen)
        return BenchReport(made.folder, made.summarize())


def _make_specs(
    model: Factory | None,
    data: Any,
    workloads: str | Sequence[str],
    hidden_seed: int | None,
    own: dict[str, Any],
    given: dict[str, Any],
) -> list[WorkloadSpec]:
    if (model is None) == (not workloads) or (model is not None and data is None):
        raise BenchError("Give a model with data, or workloads.")
    if model is not None:
        address = name_object(model, "model")
        return [WorkloadSpec(address, address, name_data(data), **own, **given)]
    return [WorkloadSpec(name, **given) for name in list_workloads(workloads, hidden_seed)]


def _name_methods(methods: str | Sequence[Entry]) -> tuple[str, ...]:
    listed = split_words(methods) if isinstance(methods, str) else methods
    return tuple(name_object(method, "method") for method in listed)


def _make_executor(config: BenchConfig, workers: int | None) -> Executor:
    specs = [(spec.model, spec.data, spec.loss, spec.metric, spec.step) for spec in config.workloads]
    inline = any(map(is_given, [*config.methods, *(word for words in specs for word in words)]))
    require_device(config.device)
    if not inline:
        count = workers_for(config.device, config.threads) if workers is None else workers
        return ProcessExecutor(count, config.threads, config.trial_limit_s)
    if workers not in (None, 1):
        raise AddressError(
            "Only what can be imported goes to other processes: for several workers, give models, data and "
            "methods by address, as in 'my_module:make_model'."
        )
    return InlineExecutor(config.threads)


def _make_screen(progress: bool) -> Any:
    from plywise._util.screen import Screen

    return Screen(highlight=False, emoji=False, markup=False, quiet=not progress)
