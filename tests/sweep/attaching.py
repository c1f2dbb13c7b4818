"""The only place that calls `Rule.attach`, and what the sweep must know of an attached rule."""

import inspect
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from contract.registry import CASES, Case
from plywise import Rule
from plywise.engine.health import UNUSED
from plywise.testing.contract.attaching import count_warm_steps

from .passes import run_pass, seeded

KINDS = ("default", "all") if "kinds" in inspect.signature(Rule.attach).parameters else ("default",)
"""What a rule is asked to handle: linear and convolution layers, or every kind of map that it can."""


@dataclass(frozen=True, eq=False)
class HalfSpeed(Rule):
    """Backpropagation at half the rate: shows whether a rule acts on what it says it handles."""

    def update(self, call: Any) -> Any:
        return call.gradient().scaled(0.5, 0.5)

    def estimate_cost(self, size: Any) -> tuple[float, float]:
        return 0.0, 0.0


RULES = {case.name: case for case in [*CASES, Case("half-speed", HalfSpeed)]}


def attach_rule(rule: Rule, model: nn.Module, kinds: str = "default", **options: Any) -> Optimizer:
    """Attach ``rule`` and return the optimizer that it was attached with, which moves nothing."""
    optimizer = SGD(model.parameters(), lr=0.0)
    if kinds != "default":
        options["kinds"] = kinds
    rule.attach(model, optimizer, **options)
    return optimizer


def warm_up(rule: Rule, model: nn.Module, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Steps that move no weight, after which a rule with memory does something.

    Only a rule that handles nothing may warn that it took no part in them.
    """
    if not rule.remembers:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* took no part in the last", RuntimeWarning)
        for _ in range(count_warm_steps(rule)):
            run_pass(model, args, kwargs)
            optimizer.step()
    if rule.health.total(UNUSED) and (handled := find_handled(rule, model)):
        raise RuntimeError(f"the rule took no part in steps of {handled}, which it says it handles")


def find_handled(rule: Rule, model: nn.Module) -> set[str]:
    """Names of the parameters that the attached rule says it handles, after the first pass.

    A row of `Rule.explain` stands for a layer's weight and bias, for one parameter, or for a part of one
    (``"in_proj_weight[0]"``); a bias without a row of its own goes with its weight.
    """
    rows: dict[str, bool] = {}
    for row in rule.explain().rows:
        name = row.name.partition("[")[0]
        rows[name] = rows.get(name, False) or row.handled
    handled = set()
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        weight = f"{owner}.{attribute.replace('bias', 'weight')}"
        if next((rows[key] for key in (name, owner, weight) if key in rows), False):
            handled.add(name)
    return handled


@cache
def is_altering(name: str, kinds: str) -> bool:
    """Whether the rule sends another value down than backpropagation's, on a small network in float64."""
    model = make_probe()
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    plain = run_pass(model, (x,), {}).inputs["input 0"]
    rule = RULES[name].make()
    try:
        optimizer = attach_rule(rule, model, kinds)
        warm_up(rule, model, optimizer, (x,), {})
        got = run_pass(model, (x,), {}).inputs["input 0"]
    except Exception:
        return True  # the checks say what raises
    finally:
        rule.detach()
    return not torch.allclose(got, plain, rtol=1e-9, atol=1e-12)


def make_probe() -> nn.Module:
    with seeded(1):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def find_cases(names: list[str] | None) -> list[Case]:
    """The registry's cases of these names, or all of them."""
    return [RULES[name] for name in names] if names else list(RULES.values())
