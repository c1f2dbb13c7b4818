"""What the training benchmarks share: networks, data, tuning with equal budgets, pictures."""

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import plywise as pw
from plywise.arena.method import with_rule
from plywise.arena.run.trial import TrialResult, run_trial
from plywise.arena.task import CLASSIFICATION, Task
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data

CROSS_ENTROPY = Task(nn.functional.cross_entropy, nn.functional.cross_entropy, "cross entropy")
HERE = Path(__file__).parent
DATA = Path(os.environ.get("PLYWISE_DATA", HERE.parent.parent / "shared" / "data"))


@dataclass(frozen=True)
class Candidate:
    """A method with one choice of its numbers."""

    method: str
    rate: float
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rule: Callable[[], pw.Rule] | None
    settings: str


def sgd(method: str, rate: float, momentum: float, rule: Callable[[], pw.Rule] | None) -> Candidate:
    """SGD with a rule."""
    settings = f"SGD(lr={rate:g}, momentum={momentum:g})" + (f" + {rule()}" if rule else "")
    return Candidate(method, rate, lambda p: torch.optim.SGD(p, rate, momentum), rule, settings)


def adamw(rate: float) -> Candidate:
    """AdamW with its default decay."""
    return Candidate("AdamW", rate, lambda p: torch.optim.AdamW(p, rate), None, f"AdamW(lr={rate:g})")


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
    log, best, lowest = [], candidates[0], float("inf")
    for candidate in candidates:
        record = trial(candidate, model, data, CROSS_ENTROPY, seed, **how)
        loss = record.validation[-1] if record.failure is None else float("inf")
        log.append(
            {
                "settings": candidate.settings,
                "validation_loss": round(loss, 5) if loss < float("inf") else None,
                "failure": record.failure,
            }
        )
        print(f"    {candidate.settings:75} {loss:.4f} {record.failure or ''}", flush=True)
        if loss < lowest:
            best, lowest = candidate, loss
    return best, log


def repeat(
    candidate: Candidate, model: Callable[[], nn.Module], data: Any, seeds: Iterable[int], **how: Any
) -> list[TrialResult]:
    """Fresh seeds of the chosen candidate, accuracy on the test set."""
    return [trial(candidate, model, data, CLASSIFICATION, seed, test=True, **how) for seed in seeds]


def trial(
    candidate: Candidate, model: Callable[[], nn.Module], data: Any, task: Task, seed: int, **how: Any
) -> TrialResult:
    """One training; its loss is measured on the whole training set."""

    def begin() -> Any:
        network = model()
        rule = candidate.rule() if candidate.rule else None
        return with_rule(network, candidate.optimizer(network.parameters()), rule, task.loss)

    return run_trial(begin, Data(*data), task, seed=seed, train_eval_size=len(data[0].y), **how)


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
    """Write the figures beside the script."""
    (HERE / name).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
