"""What every recipe of docs/how-to/trainers.md must do, whatever the trainer."""

from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from plywise import Rule
from plywise.engine.health import SKIPPED

from .page import recipe
from .rules import RULES

EPOCHS = 3

# changes to the page's shared code, which has momentum, clipping and a scheduler
VARIANTS: dict[str, dict[str, Any]] = {
    "accumulate1": {"accumulate": 1},
    "accumulate2": {"accumulate": 2},
    "adamw": {
        "accumulate": 2,
        "clip": float("inf"),
        "make_optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "make_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    },
}

Make = Callable[..., dict[str, Any]]


class NoRule:
    """Takes a rule's place in a recipe and does nothing."""

    def attach(self, *_: object) -> None: ...

    def detach(self) -> None: ...


def trained(names: dict[str, Any], rule: Rule | NoRule, epochs: int = EPOCHS, done: int = 0) -> list[Tensor]:
    """The final weights of a recipe."""
    return weights(names["train"](rule, epochs, done))


@cache
def train_plainly(variant: str, rule_name: str = "") -> list[Tensor]:
    """The final weights of the plain loop, with or without a rule: trained once for all tests."""
    with TemporaryDirectory() as folder:
        names = recipe("Plain loop", folder=folder, **VARIANTS[variant])
        return trained(names, RULES[rule_name]() if rule_name else NoRule())


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of the weights; their names differ among the trainers."""
    return [value.clone() for value in model.state_dict().values()]


def resumed(names: dict[str, Any], rule: Rule) -> list[Tensor]:
    """The weights of a run that goes on from the checkpoint in its folder, and from nowhere else."""
    make_model = names["make_model"]

    def other_model() -> nn.Module:
        model = make_model()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.1)
        return model

    names["make_model"] = other_model
    return trained(names, rule, done=1)


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


class Promises:
    """The tests of one section of the page, which subclasses name.

    An unbroken run has the plain loop's weights, so a resumed one is compared with the plain loop too.
    """

    section: ClassVar[str]

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        """A recipe with a folder of its own."""
        numbers = count()
        return lambda section, **changes: recipe(
            section, folder=str(tmp_path / f"{next(numbers)}"), **changes
        )

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rule_name", RULES)
    def test_same_weights_as_the_plain_loop(self, rule_name: str, variant: str, make: Make) -> None:
        rule = RULES[rule_name]()
        result = trained(make(self.section, **VARIANTS[variant]), rule)
        assert same_bits(result, train_plainly(variant, rule_name))
        assert not any(map(torch.equal, result, train_plainly(variant)))
        assert rule.health.total(SKIPPED) == 0

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_same_weights_without_a_rule(self, variant: str, make: Make) -> None:
        result = trained(make(self.section, **VARIANTS[variant]), NoRule())
        assert same_bits(result, train_plainly(variant))

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rule_name", RULES)
    def test_resumed_is_unbroken(self, rule_name: str, variant: str, make: Make) -> None:
        unbroken = train_plainly(variant, rule_name)
        names = make(self.section, **VARIANTS[variant])
        before = trained(names, RULES[rule_name](), epochs=1)
        rule = RULES[rule_name]()
        assert same_bits(resumed(names, rule), unbroken)
        assert not any(map(torch.equal, before, unbroken))
        assert rule.health.total(SKIPPED) == 0

    @pytest.mark.parametrize("rule_name", RULES)
    def test_nan_skips_the_same_steps(self, rule_name: str, make: Make) -> None:
        results = []
        for section in (self.section, "Plain loop"):
            names, rule = make(section), RULES[rule_name]()
            names["x"][5] = float("nan")
            with pytest.warns(RuntimeWarning, match="this step was not taken"):
                results.append(trained(names, rule))
            assert rule.health.total(SKIPPED) == EPOCHS
        assert same_bits(*results)
        assert all(bool(value.isfinite().all()) for value in results[0])
