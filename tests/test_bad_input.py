"""Arguments of a wrong kind: every public class and function refuses them by name, in its own words.

`tests/engine/test_wrong_arguments.py` tests the methods of rules.
"""

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import plywise
from plywise.registry.names import INIT, LEARNER, LOSS, MODULE, NAMES, OPTIMIZER, RULE, SCHEDULE

WRONG: list[Any] = [
    *("x", "", b"x", None, [], {}, (), (1, 2, 3, 4), object(), 3 + 2j, lambda *_: None),
    *(math.nan, math.inf, -1, 0, -0.5, 1e30, True, nn.Linear(2, 2)),
    *(torch.tensor(2.0), torch.tensor([1.0, 2.0])),
]

NEEDED = {
    "lr": 0.1,
    "total_steps": 10,
    "steps_per_epoch": 10,
    "num_classes": 3,
    "channels": 2,
    "features": 2,
    "loss": nn.CrossEntropyLoss(),
    "activation": nn.Tanh(),
}
"""What stands for arguments without a default; the others are made below."""

LEFT_TO_TORCH = {"params", "device", "dtype"}
"""Arguments that torch itself checks, as those of its own optimizers and modules."""


PYTHONS = (
    *("not supported between", "unsupported operand", "object is not", "object does not", "object of type '"),
    *("positional argument", "must be real number", "cannot be interpreted", "to unpack"),
)
"""Parts of messages of Python, which it also raises as ValueError or TypeError."""


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def make_blocks() -> plywise.Blocks:
    net = make_net()
    return plywise.Blocks([net[:2], net[2]], torch.randn(2, 4))


def find_needed(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "blocks": make_blocks,
        "model": make_net,
        "params": lambda: list(make_net().parameters()),
    }
    return makers[name]() if name in makers else NEEDED.get(name, 3)


def is_own(error: Exception) -> bool:
    """Whether plywise raised an error that it means for users."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if any(words in str(error) for words in PYTHONS):
        return False
    is_ours = type(error).__module__ == "plywise.errors" or isinstance(error, ValueError | TypeError)
    return is_ours and "plywise" in last.filename and "site-packages/torch" not in last.filename


def find_foreign(make: Callable[..., Any], names: list[str], needed: list[str]) -> dict[str, str]:
    """The arguments for which something else than an error of plywise is raised, with the errors."""
    found: dict[str, str] = {}
    for name in names:
        for value in WRONG:
            try:
                make(**{other: find_needed(other) for other in needed if other != name}, **{name: value})
            except Exception as error:
                if not is_own(error):
                    found[f"{name}={value!r}"] = repr(error)[:120]
    return found


def list_entries(*kinds: str) -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in NAMES if entry.kind in kinds]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("entry", list_entries(RULE, OPTIMIZER, MODULE, LOSS, SCHEDULE, INIT, LEARNER))
def test_one_wrong_argument(entry: Any) -> None:
    make = getattr(import_module(f"plywise.{entry.module}"), entry.name)
    if entry.kind == RULE:
        assert not find_foreign(make, [field.name for field in dataclasses.fields(make)], [])
        return
    parameters = inspect.signature(make).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is inspect.Parameter.empty]
    assert not find_foreign(make, [p.name for p in named if p.name not in LEFT_TO_TORCH], needed)


METHODS: dict[str, Callable[[Any], Any]] = {
    "AUCMargin": lambda value: plywise.losses.AUCMargin()(value, value),
    "AUCMargin labels": lambda value: plywise.losses.AUCMargin()(torch.randn(4), value),
    "SPAUC": lambda value: plywise.losses.SPAUC().fit(value, value),
    "ThresholdNetwork": lambda value: plywise.nn.ThresholdNetwork().fit(value, value),
    "adapt_activations": lambda value: plywise.nn.adapt_activations(value),
    "unroll": lambda value: plywise.nn.unroll(value),
    "ProximalAnchor": lambda value: plywise.optim.ProximalAnchor(value),
    "PenaltyView": lambda value: plywise.PenaltyView(value, nn.MSELoss(), 1.0),
    "PenaltyView tau": lambda value: plywise.PenaltyView(make_net(), nn.MSELoss(), tau=value),
    "recommend": lambda value: plywise.recommend(value),
    "recommend batch size": lambda value: plywise.recommend(make_net(), batch_size=value),
    "Blocks": lambda value: plywise.Blocks(value, torch.randn(2, 4)),
    "split parts": lambda value: plywise.split(make_net(), value, torch.randn(2, 4)),
    "kinds": lambda value: plywise.NLMS().attach(make_net(), kinds=value),
    "register_map": lambda value: plywise.register_map(value, value),
    "LayerFreezing": lambda value: plywise.LayerFreezing().attach(make_net(), value),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_argument_of_a_method_or_function(name: str) -> None:
    assert not find_foreign(METHODS[name], ["value"], [])
