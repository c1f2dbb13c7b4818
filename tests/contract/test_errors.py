"""Errors say what, where, why and what to do; layers can be chosen in every form."""

import math
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from plywise import (
    NLMS,
    AttachError,
    BackMatching,
    Backprop,
    Consequentialism,
    PlywiseError,
    ProxProp,
    Rule,
    register_layer,
)

from .attaching import attach
from .models import backward, batch, convnet, mlp, same_bits
from .registry import CASES, Case, DiagonalNewton, case_of, selected

BAD: list[tuple[type[Rule], str, Any]] = [
    *((ProxProp, "tau", value) for value in (0, -1.0, math.nan, math.inf, "1", None, True)),
    *((ProxProp, "cg_steps", value) for value in (0, -3, 2.5)),
    (ProxProp, "solver", "exakt"),
    (ProxProp, "gram", "median"),
    (BackMatching, "mode", "rates"),
    (BackMatching, "scalar", "min"),
    *((BackMatching, "cap", value) for value in (0.0, -1.0, math.nan)),
    *((BackMatching, "eps", value) for value in (0.0, math.inf, None)),
    (BackMatching, "reduction", "none"),
    *((NLMS, "eps", value) for value in (0.0, -0.1, math.nan)),
    (NLMS, "reduction", "none"),
    *((Consequentialism, "eps", value) for value in (0.0, -0.1, math.inf)),
    (Consequentialism, "bias", "center"),
    (Consequentialism, "reduction", 3),
    (DiagonalNewton, "eps", 0),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_wrong_hyper_parameters(kind: type[Rule], name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert kind.__name__ in message
    assert f"{name} must be" in message
    assert repr(value) in message


def test_hyper_parameters_are_frozen(rule: Rule) -> None:
    with pytest.raises(AttributeError):
        rule.tau = 3.0
    with pytest.raises(TypeError):
        type(rule)(nonsense=1)


def test_plywise_errors_are_runtime_errors() -> None:
    assert issubclass(AttachError, PlywiseError)
    assert issubclass(PlywiseError, RuntimeError)


def test_unattached(case: Case) -> None:
    rule = case.make()
    for use in (rule.explain, lambda: rule.health, lambda: rule.observing(print).__enter__()):
        with pytest.raises(AttachError, match=r"is not attached.*Call attach\(model, optimizer\) first"):
            use()


def test_a_stranger_as_optimizer(rule: Rule) -> None:
    stranger = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"steps none of this model's parameters.*model\.parameters\(\)"):
        rule.attach(mlp(), stranger)
    with pytest.raises(AttachError, match=r"torch\.optim\.Optimizer as second argument, not float"):
        rule.attach(mlp(), 0.1)


def test_on_nonfinite(rule: Rule) -> None:
    with pytest.raises(ValueError, match="'skip', 'raise' or 'propagate', not 'ignore'"):
        rule.attach(mlp(), on_nonfinite="ignore")


def test_a_pattern_that_matches_nothing(rule: Rule) -> None:
    for arguments in ({"layers": "encoder.*"}, {"exclude": "encoder.*"}, {"layers": ["0", "encoder.*"]}):
        with pytest.raises(AttachError, match=r"pattern 'encoder\.\*' matches nothing.*'0', '1', '2'"):
            attach(rule, mlp(), **arguments)


def test_nothing_left_to_handle(case: Case, rule: Rule) -> None:
    name = type(rule).__name__
    for arguments, why in (
        ({"exclude": nn.Linear}, "'0': excluded"),
        ({"layers": nn.Bilinear}, "'0': not among the layers asked for"),
    ):
        with pytest.raises(AttachError, match=f"{name} finds no layer.*Sequential.*{why}.*register_map"):
            attach(rule, mlp(), **arguments)


SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"0", "4", "7"}),
    ({"layers": "0"}, {"0"}),
    ({"layers": "[04]"}, {"0", "4"}),
    ({"layers": nn.Conv2d}, {"0", "4"}),
    ({"layers": lambda name, module: getattr(module, "groups", 1) == 2}, {"4"}),
    ({"layers": ["7", nn.Conv2d]}, {"0", "4", "7"}),
    ({"layers": ("7", lambda name, module: name == "0")}, {"0", "7"}),
    ({"exclude": "7"}, {"0", "4"}),
    ({"exclude": nn.Linear}, {"0", "4"}),
    ({"exclude": ["0", nn.Linear]}, {"4"}),
    ({"exclude": lambda name, module: name < "5"}, {"7"}),
    ({"layers": nn.Conv2d, "exclude": "0"}, {"4"}),
    ({"layers": "*"}, {"0", "4", "7"}),
]


def takes_norms(rule: Rule) -> bool:
    return rule.alters_backward or "norm" in rule.kinds


def test_choosing_layers(rule: Rule) -> None:
    model = convnet()
    for arguments, expected in SELECTIONS:
        attach(rule, model, kinds=("linear", "conv"), **arguments)
        handled = {row.name for row in rule.explain().rows if row.handled}
        assert handled == expected, arguments
        # a rule that alters the backward value refuses what it leaves alone, unless that is frozen
        model.requires_grad_(True)
        for name, module in model.named_modules() if rule.alters_backward else ():
            if name and name not in expected:
                module.requires_grad_(False)
        seen: list[str] = []
        with rule.observing(lambda ply, move, below, seen=seen: seen.append(ply.name)):
            backward(model, batch((2, 6, 6)))
        assert sorted(seen) == sorted(expected), arguments
        backward(model, batch((2, 6, 6)))
        assert len(seen) == len(expected)  # observed inside the block only
        rule.detach()


def test_explain_tells_every_layer(rule: Rule) -> None:
    model = convnet()
    attach(rule, model, exclude="7")
    before = str(rule.explain())
    norms = takes_norms(rule)
    assert re.search(rf"\d+ % of {sum(p.numel() for p in model.parameters())} parameters handled", before)
    assert "waits for its first batch" in before
    for words in (type(rule).__name__, "Sequential", "excluded", "after 1st batch"):
        assert words in before
    assert norms or "its kind, 'norm', is left to the optimizer unless attach(..., kinds=...)" in before
    backward(model, batch((2, 6, 6)))
    rows = {row.name: row for row in rule.explain().rows}
    assert "after 1st batch" not in str(rule.explain())
    assert rows["0"].shape == "4×2×3×3"
    assert rows["0"].memory >= 0
    assert rows["0"].cost >= 0
    assert not rows["7"].handled
    assert rows["7"].memory is None


def test_explain_warns_below_half(rule: Rule) -> None:
    model = mlp()
    attach(rule, model, layers="4")
    text = str(rule.explain())
    assert "17 % of 155 parameters handled, 1 of 3 layers" in text
    assert "more than half of the parameters are left to the optimizer, most of them in '2' (Linear)" in text


def test_register_layer_refuses_nonsense() -> None:
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module, not 3"):
        register_layer(3, None)
    with pytest.raises(TypeError, match=r"instance of plywise\.layers\.LayerType"):
        register_layer(nn.Bilinear, nn.Linear)


def test_a_users_own_rule_enters_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_rules")
    module.make = lambda: DiagonalNewton(eps=0.5)
    module.MyRule = DiagonalNewton
    module.case = Case("mine", Backprop, rates=(3.0,))
    module.wrong = lambda: 3
    monkeypatch.setitem(sys.modules, "my_rules", module)
    cases = selected(["my_rules:make", "my_rules:MyRule", "my_rules:case"])
    assert [case.name for case in cases] == ["my_rules:make", "my_rules:MyRule", "mine"]
    assert cases[0].make().eps == 0.5
    assert cases[2] is module.case
    assert selected([]) is CASES
    with pytest.raises(ValueError, match="MODULE:FACTORY, not 'my_rules'"):
        case_of("my_rules")
    with pytest.raises(TypeError, match="my_rules:wrong must be"):
        case_of("my_rules:wrong")


def test_the_users_own_rule_does_what_it_says() -> None:
    # the registry's proof is a rule unlike all others: it moves and tells the layer below its own values
    data, model, plain = batch(), mlp(), mlp()
    found, expected = {}, backward(plain, data)
    rule = DiagonalNewton().attach(model)
    found = backward(model, data)
    rule.detach()
    assert not same_bits(found, expected)
