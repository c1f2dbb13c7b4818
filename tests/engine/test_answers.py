"""A rule that somebody writes: what it may leave out, and what is said of what is wrong in it."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import plywise as pw


@dataclass(frozen=True, eq=False)
class Plain(pw.Rule):
    """Nothing but an update."""

    def update(self, call):
        return call.gradient()


def run(rule, model=None):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)) if model is None else model
    rule.attach(model)
    model(torch.ones(5, 4)).sum().backward()
    return model


def answering(update):
    @dataclass(frozen=True, eq=False)
    class Mine(pw.Rule):
        def update(self, call):
            return update(call)

    return Mine()


def sending(below):
    @dataclass(frozen=True, eq=False)
    class Mine(Plain):
        def input_gradient(self, call):
            return below(call)

    return Mine()


def test_a_rule_need_not_estimate_its_cost():
    rule = Plain()
    model = run(rule)
    row = rule.explain().rows[0]
    assert math.isnan(row.cost)
    assert math.isnan(row.memory)
    assert "unknown" in str(rule.explain())
    expected = copy.deepcopy(model)
    rule.detach()
    expected.zero_grad()
    expected(torch.ones(5, 4)).sum().backward()
    assert all(
        torch.equal(one.grad, two.grad)
        for one, two in zip(model.parameters(), expected.parameters(), strict=True)
    )


UPDATES = {
    "a tensor": (lambda call: call.weight, r"must return a plywise\.Update, not Parameter|not Tensor"),
    "nothing": (lambda call: None, r"must return a plywise\.Update, not NoneType"),
    "a pair": (lambda call: (call.weight, None), r"must return a plywise\.Update, not tuple"),
    "transposed": (
        lambda call: pw.Update(call.gradient().weight.t(), call.gradient().bias),
        r"moves the weight of layer '2' by a tensor of shape \(3, 2\), where \(2, 3\) is wanted.*\(1, 2, 4\)",
    ),
    "one row": (
        lambda call: pw.Update(call.gradient().weight[:1], call.gradient().bias),
        r"moves the weight of layer '2' by a tensor of shape \(1, 3\), where \(2, 3\)",
    ),
    "a matrix": (
        lambda call: pw.Update(call.matrix(call.gradient()), None),
        r"moves the weight of layer '2' by a tensor of shape \(1, 2, 4\), where \(2, 3\)",
    ),
    "a bias's column": (
        lambda call: pw.Update(call.gradient().weight, call.gradient().bias.unsqueeze(1)),
        r"moves the bias of layer '2' by a tensor of shape \(2, 1\), where \(2,\)",
    ),
}


@pytest.mark.parametrize("what", list(UPDATES))
def test_a_wrong_update_is_named(what):
    update, words = UPDATES[what]
    with pytest.raises(pw.AttachError, match=words):
        run(answering(update))


BELOW = {
    "nothing": (lambda call: None, "must return a tensor, not NoneType"),
    "the outputs'": (lambda call: call.delta, r"shape \(5, 2\) for layer '2', where \(5, 3\)"),
    "a sum": (lambda call: call.input_gradient().sum(0), r"shape \(3,\) for layer '2', where \(5, 3\)"),
}


@pytest.mark.parametrize("what", list(BELOW))
def test_a_wrong_value_for_the_layer_below_is_named(what):
    below, words = BELOW[what]
    with pytest.raises(pw.AttachError, match=words):
        run(sending(below))


class NoDataclass(pw.Rule):
    def __init__(self, strength):
        self.strength = strength

    def update(self, call):
        return call.gradient()


class Bare(pw.Rule):
    def update(self, call):
        return call.gradient()


class MoreFields(Plain):
    strength: float = 2.0


class NoMoreFields(Plain):
    """A subclass that only acts otherwise needs no decorator."""

    def update(self, call):
        return call.gradient().scaled(2.0, 2.0)


@pytest.mark.parametrize(
    ("make", "fields"),
    [(lambda: NoDataclass(2.0), " with strength as fields"), (Bare, ""), (MoreFields, " with strength")],
    ids=["own __init__", "bare", "fields in a subclass"],
)
def test_a_rule_that_is_no_dataclass(make, fields):
    rule = make()
    name = type(rule).__name__
    words = rf"{name} is not a dataclass.*@dataclass\(frozen=True, eq=False\) above the class,?{fields}"
    for use in (lambda: run(rule), lambda: str(rule), lambda: copy.copy(rule)):
        with pytest.raises(pw.AttachError, match=words):
            use()


def test_a_subclass_without_hyper_parameters_of_its_own():
    rule = NoMoreFields()
    model = run(rule)
    doubled = model[2].weight.grad.clone()
    rule.detach()
    model.zero_grad()
    model(torch.ones(5, 4)).sum().backward()
    assert torch.equal(doubled, 2 * model[2].weight.grad)
    assert str(rule) == "NoMoreFields()"


def remembering(**answers):
    """A rule with running state, some of whose methods answer otherwise."""

    @dataclass(frozen=True, eq=False)
    class Mine(pw.StatefulRule):
        def update(self, call):
            return call.gradient()

        def gather(self, call, turn):
            norms = call.square_norms()
            right = {"rows": norms.new_tensor(float(norms.numel())), "squares": norms.sum()}
            return answers.get("gather", lambda right: right)(right)

        def evidence_shapes(self, shape):
            return {"rows": (), "squares": ()}

        def learned_shapes(self, shape):
            return {"mean": ()}

        def learn(self, memory, evidence):
            right = {"mean": evidence["squares"] / evidence["rows"]}
            return answers.get("learn", lambda right: right)(right)

        def finish(self, memory, gradient, groups):
            right = gradient.scaled(1 / memory["mean"], 1 / memory["mean"]), {}
            return answers.get("finish", lambda right: right)(right)

    return Mine()


ANSWERS = {
    "no rows": ("gather", lambda right: {"squares": right["squares"]}, "its 'rows' is missing"),
    "evidence of another shape": (
        "gather",
        lambda right: right | {"squares": torch.ones(2)},
        r"Mine\.gather returns for layer '' is not what evidence_shapes says: its 'squares' is \(2,\)",
    ),
    "unknown evidence": ("gather", lambda right: right | {"x": torch.ones(2)}, "should be missing"),
    "no dict": ("gather", lambda right: right["rows"], "it is a Tensor, and should be a dict of tensors"),
    "a state of another shape": (
        "learn",
        lambda right: {"mean": torch.ones(2)},
        r"Mine\.learn returns for layer '' is not what learned_shapes says: its 'mean' is \(2,\)",
    ),
    "a number": ("learn", lambda right: {"mean": 2.0}, r"its 'mean' is \('no tensor',\)"),
    "an update alone": ("finish", lambda right: right[0], r"must return a plywise\.Update and a dict"),
    "no update": ("finish", lambda right: (right[0].weight, {}), r"must return a plywise\.Update and a dict"),
    "no state": ("finish", lambda right: (right[0], None), r"must return a plywise\.Update and a dict"),
    "transposed": (
        "finish",
        lambda right: (pw.Update(right[0].weight.t(), None), {}),
        r"got a gradient of shape \(2, 5\).*not of shape \(5, 2\)",
    ),
}


@pytest.mark.parametrize("what", [None, *ANSWERS])
def test_a_wrong_answer_of_a_rule_with_running_state(what):
    method, answer, words = ANSWERS[what] if what else ("learn", lambda right: right, "")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remembering(**{method: answer}).attach(model, optimizer)

    def step():
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()

    if what is None:
        step()
        assert torch.allclose(model.weight.grad, torch.full((2, 4), 3 / 5))
    else:
        with pytest.raises(pw.AttachError, match=words):
            step()
