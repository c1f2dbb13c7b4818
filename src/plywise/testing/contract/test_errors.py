"""Errors say what, where, why and what to do; layers can be chosen in every form."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from plywise import AttachError, Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import compute_gradients, make_batch, make_convnet, make_mlp


def test_hyper_parameters_are_frozen(rule: Rule) -> None:
    with pytest.raises(AttributeError):
        rule.tau = 3.0
    with pytest.raises(TypeError):
        type(rule)(nonsense=1)


def test_unattached(case: Case) -> None:
    rule = case.make()
    for use in (rule.explain, lambda: rule.health, lambda: rule.observing(print).__enter__()):
        with pytest.raises(AttachError, match=r"is not attached.*Call attach\(model, optimizer\) first"):
            use()


def test_a_stranger_as_optimizer(rule: Rule) -> None:
    stranger = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"steps none of this model's parameters.*model\.parameters\(\)"):
        rule.attach(make_mlp(), stranger)
    with pytest.raises(AttachError, match=r"torch\.optim\.Optimizer as second argument, not float"):
        rule.attach(make_mlp(), 0.1)


def test_on_nonfinite(rule: Rule) -> None:
    with pytest.raises(ValueError, match="'skip', 'raise' or 'propagate', not 'ignore'"):
        rule.attach(make_mlp(), on_nonfinite="ignore")


def test_a_pattern_that_matches_nothing(rule: Rule) -> None:
    for arguments in ({"layers": "encoder.*"}, {"exclude": "encoder.*"}, {"layers": ["0", "encoder.*"]}):
        with pytest.raises(AttachError, match=r"pattern 'encoder\.\*' matches nothing.*'0', '1', '2'"):
            attach(rule, make_mlp(), **arguments)


def test_nothing_left_to_handle(case: Case, rule: Rule) -> None:
    name = type(rule).__name__
    for arguments, why in (
        ({"exclude": nn.Linear}, "'0': excluded"),
        ({"layers": nn.Bilinear}, "'0': not among the layers asked for"),
    ):
        with pytest.raises(AttachError, match=f"{name} finds no layer.*Sequential.*{why}.*register_map"):
            attach(rule, make_mlp(), **arguments)


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
    model = make_convnet()
    for arguments, expected in SELECTIONS:
        model.requires_grad_(True)
        attach(rule, model, kinds=("linear", "conv"), **arguments)
        handled = {row.name for row in rule.explain().rows if row.handled}
        assert handled == expected, arguments
        # a rule that alters the backward value refuses what it leaves alone, unless that is frozen
        for name, module in model.named_modules() if rule.alters_backward else ():
            if name and name not in expected:
                module.requires_grad_(False)
        seen: list[str] = []
        with rule.observing(lambda ply, move, below, seen=seen: seen.append(ply.name)):
            compute_gradients(model, make_batch((2, 6, 6)))
        assert sorted(seen) == sorted(expected), arguments
        compute_gradients(model, make_batch((2, 6, 6)))
        assert len(seen) == len(expected)  # observed inside the block only
        rule.detach()


def test_explain_tells_every_layer(rule: Rule) -> None:
    model = make_convnet()
    attach(rule, model, exclude="7")
    before = str(rule.explain())
    norms = takes_norms(rule)
    assert re.search(rf"\d+ % of {sum(p.numel() for p in model.parameters())} parameters handled", before)
    assert "waits for its first batch" in before
    for words in (type(rule).__name__, "Sequential", "excluded", "after 1st batch"):
        assert words in before
    assert norms or "its kind, 'norm', is left to the optimizer unless attach(..., kinds=...)" in before
    compute_gradients(model, make_batch((2, 6, 6)))
    rows = {row.name: row for row in rule.explain().rows}
    assert "after 1st batch" not in str(rule.explain())
    assert rows["0"].shape == "4×2×3×3"
    for estimate in (rows["0"].memory, rows["0"].cost):
        assert estimate >= 0 or math.isnan(estimate)  # a rule need not estimate them
    assert not rows["7"].handled
    assert rows["7"].memory is None


def test_explain_warns_below_half(rule: Rule) -> None:
    model = make_mlp()
    attach(rule, model, layers="4")
    text = str(rule.explain())
    assert "17 % of 155 parameters handled, 1 of 3 layers" in text
    assert "more than half of the parameters are left to the optimizer, most of them in '2' (Linear)" in text
