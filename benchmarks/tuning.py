"""Networks, data and tuning with equal budgets, shared by the training benchmarks."""

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import plywise as pw
from plywise.arena.method import Method, Trainer, TrialContext, with_rule
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.trial import TrialResult
from plywise.arena.scoring.records import TUNED, TrialRecord
from plywise.arena.task import CLASSIFICATION, Task
from plywise.arena.workload import Workload
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data

CROSS_ENTROPY = Task(nn.functional.cross_entropy, nn.functional.cross_entropy, "cross entropy")
HERE = Path(__file__).parent
DATA = Path(os.environ.get("PLYWISE_DATA", HERE.parent.parent / "shared" / "data"))


@dataclass(frozen=True)
class Candidate:
    """A method with one choice of its numbers; ``make`` returns an optimizer for a model."""

    method: str
    rate: float
    make: Callable[[nn.Module], torch.optim.Optimizer]
    rule: Callable[[], pw.Rule] | None
    settings: str


def make_sgd(method: str, rate: float, momentum: float, rule: Callable[[], pw.Rule] | None) -> Candidate:
    """Make a candidate: SGD, with a rule or without."""
    settings = f"SGD(lr={rate:g}, momentum={momentum:g})" + (f" + {rule()}" if rule else "")
    return Candidate(
        method, rate, lambda model: torch.optim.SGD(model.parameters(), rate, momentum), rule, settings
    )


def make_adamw(rate: float) -> Candidate:
    """Make a candidate: AdamW with its default weight decay."""
    return Candidate(
        "AdamW",
        rate,
        lambda model: torch.optim.AdamW(model.parameters(), rate, fused=True),
        None,
        f"AdamW(lr={rate:g})",
    )


def make_mlp(widths: tuple[int, ...], scales: tuple[float, ...] | None = None) -> nn.Sequential:
    """Make a ReLU network with He initialisation, weights of layer l times ``scales[l]``, and zero biases."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        linear.weight.data.mul_(scales[index] if scales else 1.0)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def read_digits() -> tuple[Split, Split, Split]:
    """Read the digits: training, validation and test part."""
    return load_digits(0)


def read_mnist() -> tuple[Split, Split, Split]:
    """Read MNIST: 50,000 training, 10,000 validation and 10,000 test images."""
    with np.load(DATA / "mnist.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    x, y = arrays["x_train"].flatten(1).float() / 255, arrays["y_train"].long()
    test = Split(arrays["x_test"].flatten(1).float() / 255, arrays["y_test"].long())
    return Split(x[:50000], y[:50000]), Split(x[50000:], y[50000:]), test


def tune(
    candidates: list[Candidate],
    model: Callable[[], nn.Module],
    data: Any,
    seed: int,
    **workload_settings: Any,
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Return the candidate with the lowest final validation loss, and the log of all candidates."""
    design = Design(0, tracks=(), tuning_seed=seed)
    log, losses = [], []
    for index, line in enumerate(
        run_candidates(candidates, model, data, CROSS_ENTROPY, design, **workload_settings)
    ):
        loss = line["validation"][-1] if line["failure"] is None else math.inf
        settings = candidates[index].settings
        losses.append(loss)
        shown = round(loss, 5) if loss < math.inf else None
        log.append({"settings": settings, "validation_loss": shown, "failure": line["failure"]})
        print(f"    {settings:75} {loss:.4f} {line['failure'] or ''}", flush=True)
    return candidates[losses.index(min(losses))], log


def repeat(
    candidate: Candidate, model: Callable[[], nn.Module], data: Any, seeds: int, **workload_settings: Any
) -> list[TrialResult]:
    """Run the chosen candidate with fresh seeds from 0; the metric is the accuracy on the test set."""
    design = Design(seeds, tracks=(TUNED,))
    lines = run_candidates([candidate], model, data, CLASSIFICATION, design, **workload_settings)
    names = [field.name for field in fields(TrialResult)]
    return [TrialResult(**{name: line[name] for name in names}) for line in lines]


def run_candidates(
    candidates: list[Candidate],
    model: Callable[[], nn.Module],
    data: Any,
    task: Task,
    design: Design,
    **workload_settings: Any,
) -> list[TrialRecord]:
    """Run trials of one method's candidates; the loss is measured on the whole training set."""
    whole = Data(*data)
    workload = Workload(
        "own", "", model, lambda: whole, task, train_eval_size=len(whole.train.y), **workload_settings
    )

    def begin(context: TrialContext) -> Trainer:
        candidate = candidates[int(context.numbers["candidate"])]
        rule = candidate.rule() if candidate.rule else None
        return with_rule(context.model, candidate.make(context.model), rule, task.loss)

    grid = tuple({"candidate": float(index)} for index in range(len(candidates)))
    method = Method(candidates[0].method, "", {}, begin, grid=grid)
    return run_arms(workload, [method], design).lines("own", method.name)


def first_step_below(record: TrialResult, target: float) -> int | None:
    """Return the steps until the training loss is at or below ``target``, or None."""
    return next((s for s, loss in zip(record.steps, record.loss, strict=True) if loss <= target), None)


def compute_accuracy(record: TrialResult) -> float | None:
    """Return the accuracy on the test set, or None without a test."""
    return None if record.test is None else round(1 - record.test, 5)


def compute_median(values: Iterable[float | None]) -> float | None:
    """Return the median, where None counts as infinity; None if the median is infinite."""
    middle = statistics.median(float("inf") if value is None else value for value in values)
    return None if middle == float("inf") else middle


def write_json(name: str, result: dict[str, Any]) -> None:
    """Write the figures next to the script, one method per line."""
    text = json.dumps(result, ensure_ascii=False).replace('{"settings"', '\n{"settings"')
    (HERE / name).write_text(text + "\n")
