"""accelerate's recipe, and what happens in another order."""

from pathlib import Path
from typing import Any

import pytest
import torch

from plywise import AttachError, ProxProp

from .page import recipe
from .promises import NoRule, Promises, same_bits, trained
from .rules import RULES


@pytest.fixture(autouse=True, scope="module")
def _accelerate() -> None:
    """Only where its tests run: it takes seconds to import."""
    pytest.importorskip("accelerate")


class TestAccelerate(Promises):
    section = "accelerate"


@pytest.mark.parametrize("rule_name", RULES)
def test_attached_to_what_is_inside_after_prepare(rule_name: str, tmp_path: Path) -> None:
    rule = RULES[rule_name]()

    names = recipe("accelerate", folder=str(tmp_path / "late"))

    class Accelerator(names["Accelerator"]):
        def prepare(self, *parts: Any, **settings: Any) -> Any:
            model, optimizer, *others = super().prepare(*parts, **settings)
            rule.attach(self.unwrap_model(model), optimizer.optimizer)
            return model, optimizer, *others

    names["Accelerator"] = Accelerator
    early = trained(recipe("accelerate", folder=str(tmp_path / "early")), RULES[rule_name]())
    assert same_bits(trained(names, NoRule()), early)


@pytest.mark.parametrize("rule_name", RULES)
def test_loaded_before_attach(rule_name: str, tmp_path: Path) -> None:
    names = recipe("accelerate", folder=str(tmp_path))
    unbroken = trained(names, RULES[rule_name]())
    names["train"](RULES[rule_name](), 1)
    rule, prepared = RULES[rule_name](), []

    class Accelerator(names["Accelerator"]):
        def prepare(self, *parts: Any, **settings: Any) -> Any:
            prepared.extend(super().prepare(*parts, **settings))
            return tuple(prepared)

        def load_state(self, *args: Any, **settings: Any) -> None:
            super().load_state(*args, **settings)
            rule.attach(self.unwrap_model(prepared[0]), prepared[1].optimizer)

    names["Accelerator"] = Accelerator
    assert same_bits(trained(names, NoRule(), done=1), unbroken)


def test_the_wrapper_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    names = recipe("accelerate", folder=str(tmp_path))
    model = names["make_model"]()
    inside = names["make_optimizer"](model.parameters())
    optimizer = names["Accelerator"](cpu=True).prepare(inside)
    assert isinstance(optimizer, torch.optim.Optimizer)
    rule = ProxProp()
    with pytest.raises((AttachError, AttributeError)):
        rule.attach(model, optimizer)
    assert not any(module._forward_hooks for module in model)
    rule.attach(model, inside)
