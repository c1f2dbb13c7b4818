"""What `plywise demo` compares: every rule and two optimizers, with settings that have been tuned before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from plywise.arena.method import EndToEnd, Method, Trainer, TrialContext, with_rule
from plywise.arena.space import Range
from plywise.arena.task import CLASSIFICATION
from plywise.engine.rule import Rule
from plywise.registry.find import find_rule

DECADES = 2.0
"""The sweep goes this many decades below and above the tuned rate."""


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

    def train(self, make_model: Callable[[], nn.Module], rate: float | None = None) -> EndToEnd:
        """Make a model and begin to train it, at another rate if given."""
        model = make_model()
        settings = {"lr": self.rate if rate is None else rate, **self.optimizer_settings}
        optimizer = getattr(torch.optim, self.optimizer)(model.parameters(), **settings)
        return with_rule(model, optimizer, self.make_rule(), CLASSIFICATION.loss)

    def as_method(self, rates: int) -> Method:
        """The setup as a method of the arena, whose tuning trials sweep over so many rates."""

        def make(context: TrialContext) -> Trainer:
            return self.train(lambda: context.model, context.numbers["lr"])

        factors = [10**exponent for exponent in torch.linspace(-DECADES, DECADES, rates).tolist()]
        return Method(
            self.name,
            str(self),
            {"lr": Range(self.rate * 10**-DECADES, self.rate * 10**DECADES, self.rate)},
            make,
            baseline=self.rule is None,
            null="SGD" if self.rule == "Backprop" else None,
            grid=tuple({"lr": self.rate * factor} for factor in factors),
        )

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


def _arguments(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())
