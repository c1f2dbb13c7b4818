"""What `plywise demo` compares: methods of the arena, with numbers that have been tuned before."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from plywise.arena.method import Method, Numbers
from plywise.arena.methods import find_method

DECADES = 1.0
"""The sweep goes this many decades below and above the tuned rate."""

REFERENCE = "adamw"
"""The null control repeats it; the arena's repeats SGD, which is the slowest here to reach a target."""

SETUPS: Mapping[str, Numbers] = {
    "sgd": {"lr": 0.24, "weight_decay": 0.000159},
    "adamw": {"lr": 0.0227, "weight_decay": 0.0108},
    "muon": {"lr": 0.087, "weight_decay": 0.000794},
    "recommended": {"lr": 0.0728, "weight_decay": 0.00411},
    "proxprop": {"lr": 7.19, "tau": 1.59},
    "back-matching": {"lr": 0.0719, "cap": 0.447},
    "consequentialism": {"lr": 0.0191, "eps": 0.016},
    "associated-learning": {"lr": 0.0114, "code": 41.2},
}
"""Tuned on the validation split, the same budget for each (benchmarks/tune_demo.py): three established
optimizers, what `plywise.recommend` makes, and the four papers that plywise began with."""


def make_methods(setups: Mapping[str, Numbers], rates: int) -> list[Method]:
    """Return the methods at their tuned numbers; their tuning trials sweep over so many rates.

    `REFERENCE` comes a second time, as the null control, without a sweep.
    """
    found = [
        _sweep(_fix_numbers(find_method(name), numbers), numbers, rates) for name, numbers in setups.items()
    ]
    if REFERENCE in setups:
        again = _fix_numbers(find_method(REFERENCE), setups[REFERENCE])
        about = f"{again.about} a second time: the null control"
        found.append(replace(again, name=f"{REFERENCE}-again", about=about, baseline=False, null=REFERENCE))
    return found


def _sweep(method: Method, numbers: Numbers, rates: int) -> Method:
    factors = [10**exponent for exponent in torch.linspace(-DECADES, DECADES, rates).tolist()]
    return replace(method, grid=tuple({**numbers, "lr": numbers["lr"] * factor} for factor in factors))


def _fix_numbers(method: Method, numbers: Numbers) -> Method:
    """Return a method whose numbers, where nothing is tuned, are these."""
    space = {name: replace(one, default=numbers[name]) for name, one in method.space.items()}
    return replace(method, space=space)
