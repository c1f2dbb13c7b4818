"""The page's plain loop, the measure of the other recipes, and that each of its parts matters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plywise import BackMatching, Rule

from .page import recipe
from .promises import VARIANTS, Promises, same_bits, trained
from .rules import RULES


class TestPlainLoop(Promises):
    section = "Plain loop"


PARTS = {
    "clipping": {"clip": float("inf")},
    "scheduler": {"make_scheduler": VARIANTS["adamw"]["make_scheduler"]},
    "momentum": {"make_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)},
    "accumulation": {"accumulate": 1},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rule_name", RULES)
def test_every_part_matters(rule_name: str, part: str, tmp_path: Path) -> None:
    whole = trained(recipe("Plain loop", folder=str(tmp_path)), RULES[rule_name]())
    less = trained(recipe("Plain loop", folder=str(tmp_path), **PARTS[part]), RULES[rule_name]())
    assert not same_bits(whole, less)


def test_the_cap_matters(tmp_path: Path) -> None:
    makers: list[Callable[[], Rule]] = [RULES["back_matching"], lambda: BackMatching(cap=None)]
    names = recipe("Plain loop", folder=str(tmp_path))
    assert not same_bits(*(trained(names, make()) for make in makers))
