"""What the training benchmarks share: networks, data, tuning with equal budgets, pictures."""

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


def sgd(method: str, rate: float, momentum: float, rule: Callable[[], pw.Rule] | None) -> Candidate:
    """SGD with a rule."""
    settings = f"SGD(lr={rate:g}, momentum={momentum:g})" + (f" + {rule()}" if rule else "")
    return Candidate(
        method, rate, lambda model: torch.optim.SGD(model.parameters(), rate, momentum), rule, settings
    )


def adamw(rate: float) -> Candidate:
    """AdamW with its default decay."""
    return Candidate(
        "AdamW",
        rate,
        lambda model: torch.optim.AdamW(model.parameters(), rate, fused=True),
        None,
        f"AdamW(lr={rate:g})",
    )


def mlp(widths: tuple[int, ...], scales: tuple[float, ...] | None = None) -> nn.Sequential:
    """A ReLU network, He initialisation, layer l's weights multiplied by ``scales[l]``; biases zero."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        linear.weight.data.mul_(scales[index] if scales else 1.0)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> tuple[Split, Split, Split]:
    """Train, validation and test digits."""
    return load_digits(0)


def mnist() -> tuple[Split, Split, Split]:
    """50,000 / 10,000 / 10,000 MNIST images."""
    with np.load(DATA / "mnist.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    x, y = arrays["x_train"].flatten(1).float() / 255, arrays["y_train"].long()
    test = Split(arrays["x_test"].flatten(1).float() / 255, arrays["y_test"].long())
    return Split(x[:50000], y[:50000]), Split(x[50000:], y[50000:]), test


def tune(
    candidates: list[Candidate], model: Callable[[], nn.Module], data: Any, seed: int, **how: Any
) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the lowest final validation loss, and the log of all."""
    design = Design(0, tracks=(), tuning_seed=seed)
    log, losses = [], []
    for index, line in enumerate(run_candidates(candidates, model, data, CROSS_ENTROPY, design, **how)):
        loss = line["validation"][-1] if line["failure"] is None else math.inf
        settings = candidates[index].settings
        losses.append(loss)
        shown = round(loss, 5) if loss < math.inf else None
        log.append({"settings": settings, "validation_loss": shown, "failure": line["failure"]})
        print(f"    {settings:75} {loss:.4f} {line['failure'] or ''}", flush=True)
    return candidates[losses.index(min(losses))], log


def repeat(
    candidate: Candidate, model: Callable[[], nn.Module], data: Any, seeds: int, **how: Any
) -> list[TrialResult]:
    """Fresh seeds of the chosen candidate, from 0, accuracy on the test set."""
    design = Design(seeds, tracks=(TUNED,))
    lines = run_candidates([candidate], model, data, CLASSIFICATION, design, **how)
    names = [field.name for field in fields(TrialResult)]
    return [TrialResult(**{name: line[name] for name in names}) for line in lines]


def run_candidates(
    candidates: list[Candidate],
    model: Callable[[], nn.Module],
    data: Any,
    task: Task,
    design: Design,
    **how: Any,
) -> list[TrialRecord]:
    """Trials of one method's candidates; the loss is measured on the whole training set."""
    whole = Data(*data)
    workload = Workload("own", "", model, lambda: whole, task, train_eval_size=len(whole.train.y), **how)

    def begin(context: TrialContext) -> Trainer:
        candidate = candidates[int(context.numbers["candidate"])]
        rule = candidate.rule() if candidate.rule else None
        return with_rule(context.model, candidate.make(context.model), rule, task.loss)

    grid = tuple({"candidate": float(index)} for index in range(len(candidates)))
    method = Method(candidates[0].method, "", {}, begin, grid=grid)
    return run_arms(workload, [method], design).lines("own", method.name)


def first_step_below(record: TrialResult, target: float) -> int | None:
    """Steps until the training loss is at or below ``target``; None if never."""
    return next((s for s, loss in zip(record.steps, record.loss, strict=True) if loss <= target), None)


def accuracy(record: TrialResult) -> float | None:
    """Share of the test set that was right."""
    return None if record.test is None else round(1 - record.test, 5)


def median(values: Iterable[float | None]) -> float | None:
    """Median, a miss (None) counting as infinity; None if that is the median."""
    middle = statistics.median(float("inf") if value is None else value for value in values)
    return None if middle == float("inf") else middle


def write_json(name: str, result: dict[str, Any]) -> None:
    """Write the figures beside the script, a method a line."""
    text = json.dumps(result, ensure_ascii=False).replace('{"settings"', '\n{"settings"')
    (HERE / name).write_text(text + "\n")
