"""What `plywise demo` runs: every rule and two optimizers on handwritten digits, in about a minute.

`perform` is a generator that fills a study (see `plywise.arena.demo.report`) and yields after each piece of
work, so that an interrupted demo keeps all that it has measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.demo.layer_picture import layer_picture
from plywise.arena.demo.report import write_report
from plywise.arena.method import EndToEnd, with_rule
from plywise.arena.run.trial import TrialResult, run_trial
from plywise.arena.task import CLASSIFICATION
from plywise.data.batches import endless_batches
from plywise.data.digits import ATTRIBUTION, Split, load_digits
from plywise.data.parts import Data
from plywise.engine.rule import Rule
from plywise.registry.find import find_rule

BATCH_SIZE = 128


@dataclass(frozen=True)
class Setup:
    """A method as the demo runs it.

    Attributes:
        name: what the report calls it.
        rate: the tuned learning rate.
        rule: name of the rule, or None for plain training.
        rule_settings: its hyper-parameters, where they are not the defaults.
        optimizer: name of a class in `torch.optim`.
        optimizer_settings: its arguments besides the rate.
    """

    name: str
    rate: float
    rule: str | None = None
    rule_settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "SGD"
    optimizer_settings: dict[str, Any] = field(default_factory=dict)

    def make_rule(self) -> Rule | None:
        """A fresh rule, or None."""
        return None if self.rule is None else find_rule(self.rule)(**self.rule_settings)

    def train(self, model: nn.Module, rate: float | None = None) -> EndToEnd:
        """Begin to train a model, at another rate if given."""
        settings = {"lr": self.rate if rate is None else rate, **self.optimizer_settings}
        optimizer = getattr(torch.optim, self.optimizer)(model.parameters(), **settings)
        return with_rule(model, optimizer, self.make_rule(), CLASSIFICATION.loss)

    def __str__(self) -> str:
        settings = {"lr": self.rate, **self.optimizer_settings}
        optimizer = f"{self.optimizer}({_arguments(settings)})"
        return (
            optimizer if self.rule is None else f"{self.rule}({_arguments(self.rule_settings)}) + {optimizer}"
        )


MOMENTUM = {"momentum": 0.9}
SETUPS = (
    Setup("SGD", 0.19, optimizer_settings=MOMENTUM),
    Setup("AdamW", 0.013, optimizer="AdamW", optimizer_settings={"weight_decay": 0.068}),
    Setup("Backprop", 0.19, "Backprop", optimizer_settings=MOMENTUM),
    Setup("ProxProp", 16.0, "ProxProp", {"tau": 3.0}),
    Setup("BackMatching", 0.025, "BackMatching", {"scalar": "mean"}, optimizer_settings=MOMENTUM),
    Setup("NLMS", 2.1, "NLMS", {"eps": 0.034}, optimizer_settings=MOMENTUM),
    Setup("Consequentialism", 0.11, "Consequentialism", {"eps": 0.016}),
    Setup("RLS", 0.45, "RLS", {"gain": 4.7}, optimizer_settings=MOMENTUM),
    Setup("FeatureWhitening", 0.56, "FeatureWhitening", {"damping": 0.00022}),
    Setup("AdaBK", 0.81, "AdaBK", {"damping": 0.0052}),
    Setup("KFAC", 0.12, "KFAC", {"damping": 0.45}, optimizer_settings=MOMENTUM),
    Setup("Foof", 0.13, "Foof", {"damping": 4.7}, optimizer_settings=MOMENTUM),
    Setup("Coordinates", 0.0071, "Coordinates", {"damping": 0.016}, "AdamW", {"weight_decay": 0.022}),
)
"""Tuned on the validation split, the same budget for each (benchmarks/tune_demo.py); Backprop is the null
control, so it has the settings of SGD."""


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo does; the defaults take about a minute on one core."""

    seeds: int = 3
    steps: int = 300
    sensitivity_steps: int = 100
    rates: int = 9
    cost_rounds: int = 20
    cost_block: int = 10
    hidden: tuple[int, ...] = (128, 128, 128)
    setups: tuple[Setup, ...] = SETUPS

    def make_model(self) -> nn.Sequential:
        """The network: digits in, ReLU between, ten classes out."""
        sizes = (64, *self.hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))

    @property
    def pieces(self) -> int:
        """How often `perform` yields."""
        return len(self.setups) * (self.seeds + self.rates) + 2


@dataclass(frozen=True)
class DemoProgress:
    """One piece of work is done: which, of how many, and what came of it."""

    done: int
    total: int
    text: str


def new_study(plan: DemoConfig, command: str) -> dict[str, Any]:
    """A study in which nothing has been measured yet."""
    shape = "-".join(map(str, (64, *plan.hidden, 10)))
    return {
        "title": "plywise demo: handwritten digits",
        "summary": f"{len(plan.setups)} ways to train one network ({shape}, ReLU) on 1,100 handwritten "
        f"digits of 8×8 pixels: {plan.steps} steps with batches of {BATCH_SIZE}, {plan.seeds} "
        f"seed{'s' if plan.seeds != 1 else ''} each, tested on 400 other digits.",
        "reading": [],
        "command": command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "elapsed_seconds": None,
        "environment": environment(),
        "attribution": ATTRIBUTION,
        "plan": {key: value for key, value in asdict(plan).items() if key not in ("setups", "hidden")},
        "methods": [
            {"name": setup.name, "settings": str(setup), "runs": [], "relative_step_cost": None}
            for setup in plan.setups
        ],
        "sensitivity": [],
        "layers": {"names": [], "series": [], "caption": ""},
    }


def perform(plan: DemoConfig, study: dict[str, Any]) -> Iterator[DemoProgress]:
    """Run the demo, filling ``study``; yields after each piece of work.

    Seeds go round all methods, so that what an interrupted demo has is complete as far as it goes.
    """
    data = Data(*load_digits())
    done = 0

    def progress(text: str) -> DemoProgress:
        nonlocal done
        done += 1
        return DemoProgress(done, plan.pieces, text)

    for setup in plan.setups:  # the first step of a rule imports and warms up; keep that off every clock
        demo_trial(plan, setup, data, seed=0, steps=2)
    rules = {setup.name: rule for setup in plan.setups if (rule := setup.make_rule()) is not None}
    # rules with memory send down what backpropagation does
    rules = {name: rule for name, rule in rules.items() if not rule.remembers}
    study["layers"] = layer_picture(plan.make_model, rules, *next(endless_batches(data.train, BATCH_SIZE, 0)))
    yield progress("sizes of the backward values, layer by layer")
    for seed in range(plan.seeds):
        for setup, method in zip(plan.setups, study["methods"], strict=True):
            record = demo_trial(plan, setup, data, seed=seed, steps=plan.steps, measure_every=5)
            run = summarize_trial(record)
            method["runs"].append(run)
            outcome = run["failure"] or f"loss {run['final_loss']:.2g}, accuracy {run['test_accuracy']:.1%}"
            yield progress(f"{setup.name}, seed {seed}: {outcome}")
    for method, cost in zip(study["methods"], step_costs(plan, data.train), strict=True):
        method["relative_step_cost"] = cost
    yield progress("relative cost of a step")
    for setup in plan.setups:
        yield from _sensitivity(plan, setup, data, study, progress)


def _sensitivity(
    plan: DemoConfig, setup: Setup, data: Data, study: dict[str, Any], progress: Any
) -> Iterator[DemoProgress]:
    """Final training loss at rates over four decades around the tuned one."""
    line: dict[str, Any] = {"name": setup.name, "default_rate": setup.rate, "rates": [], "final_loss": []}
    study["sensitivity"].append(line)
    for exponent in torch.linspace(-2, 2, plan.rates).tolist():
        rate = setup.rate * 10**exponent
        steps = plan.sensitivity_steps
        record = demo_trial(plan, setup, data, rate, seed=0, steps=steps, measure_every=steps)
        line["rates"].append(rate)
        line["final_loss"].append(record.final_loss)
        outcome = "failed" if record.failure else f"loss {record.final_loss:.2g}"
        yield progress(f"{setup.name} at rate {rate:.3g}: {outcome}")


def demo_trial(
    plan: DemoConfig, setup: Setup, data: Data, rate: float | None = None, **how: Any
) -> TrialResult:
    """One training, at another rate if given; see `run_trial`."""
    return run_trial(
        lambda: setup.train(plan.make_model(), rate),
        data,
        CLASSIFICATION,
        batch_size=BATCH_SIZE,
        test=True,
        look=len(data.train.y),
        **how,
    )


def summarize_trial(record: TrialResult) -> dict[str, Any]:
    """A record as the study keeps it."""
    run = record.as_dict()
    return {
        **{key: run[key] for key in ("seed", "steps", "loss", "failure")},
        "cpu_seconds": run["cpu"],
        "test_accuracy": None if run["test"] is None else 1 - run["test"],
        "final_loss": record.final_loss,
    }


def save(study: dict[str, Any], folder: Path) -> Path:
    """Write ``study.json`` and ``report.html``, each whole or not at all; returns the page's path."""
    write_whole(folder / "study.json", json.dumps(study, ensure_ascii=False, allow_nan=False) + "\n")
    return write_report(study, folder / "report.html")


# ---- the cost of a step ------------------------------------------------------------------------


def step_costs(plan: DemoConfig, train: Split) -> list[float]:
    """Processor time of a step of each method relative to plain SGD.

    Blocks of steps of all methods take turns with blocks of SGD, and each block is compared with the
    SGD block of its own round: what disturbs the machine then disturbs both. The median of the ratios
    counts. "SGD" itself is a second copy, hence 1 up to noise.
    """
    reference = Setup("SGD", 0.01, optimizer_settings=MOMENTUM)
    arms = []
    for setup in (reference, *plan.setups):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = plan.make_model()
        # a small rate: only the clock matters here, and a diverging loss would stop it
        trainer = setup.train(model, setup.rate / 10)
        arms.append((trainer.step, endless_batches(train, BATCH_SIZE, 0)))
    ratios: list[list[float]] = [[] for _ in plan.setups]
    for _ in range(plan.cost_rounds):
        clocks = []
        for step, batches in arms:
            rows = [next(batches) for _ in range(plan.cost_block)]
            start = time.process_time()
            for x, y in rows:
                step(x, y)
            clocks.append(time.process_time() - start)
        for ratio, clock in zip(ratios, clocks[1:], strict=True):
            ratio.append(clock / clocks[0])
    return [statistics.median(ratio) for ratio in ratios]


def _arguments(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())
