"""The sweep finds what is broken on purpose, each by the check that is there for it."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plywise import AttachError, Backprop, Rule
from plywise.testing.cases import Case

from . import attaching, promises
from .attaching import HalfSpeed
from .database import Sample
from .gradient_checks import check_as_torch
from .promises import check_rule, make_subject
from .report import Report

SAMPLE = Sample("nn.LayerNorm", dtype=torch.float64)


class FalseGradient(Backprop):
    """Gradients of handled parameters a little off."""

    def update(self, call):
        return call.gradient().scaled(1.01, 1.01)


class FalseBelow(Backprop):
    """The layer below receives a little too much, which goes into parameters left alone."""

    def input_gradient(self, call):
        return call.input_gradient() * (1 + 1e-9)


class Crash(HalfSpeed):
    def update(self, call):
        return call.missing


class ShortRefusal(HalfSpeed):
    def update(self, call):
        raise AttachError("no")


class NotFinite(HalfSpeed):
    def update(self, call):
        return call.gradient().scaled(float("inf"), 1.0)


class HalfOfHalf(HalfSpeed):
    def update(self, call):
        return call.gradient().scaled(0.25, 0.25)


class StaysAttached(HalfSpeed):
    def detach(self):
        """Does not."""


@dataclass(frozen=True, eq=False)
class Silent(HalfSpeed):
    """Explains nothing."""

    def explain(self, batch_size=128):
        return type(Rule.explain(self))("", [])


def sweep(rule, *, is_backprop=False):
    """The names of the checks that a rule does not pass."""
    report = Report()
    attaching.RULES["broken"] = case = Case("broken", rule, is_backprop=is_backprop)
    attaching.is_altering.cache_clear()
    try:
        check_rule(make_subject(SAMPLE), case, "default", report)
    finally:
        del attaching.RULES["broken"]
    return {problem.check for problem in report.problems}


def test_nothing_is_found_where_nothing_is_broken():
    assert sweep(Backprop, is_backprop=True) == set()
    assert sweep(HalfSpeed) == set()


@pytest.mark.parametrize(
    ("rule", "check"),
    [
        (FalseGradient, "identity"),
        (FalseBelow, "identity"),
        (ShortRefusal, "error"),
    ],
)
def test_a_false_identity_is_found(rule, check):
    assert check in sweep(rule, is_backprop=True)


@pytest.mark.parametrize(
    ("rule", "check"),
    [
        (Crash, "error"),
        (ShortRefusal, "readable"),
        (NotFinite, "finite"),
        (HalfOfHalf, "acts"),
        (StaysAttached, "detach"),
        (Silent, "explain"),
    ],
)
def test_a_broken_rule_is_found(rule, check):
    assert check in sweep(rule)


def test_a_change_of_the_output_is_found(monkeypatch):
    def shift(rule, model, kinds="default", **options):
        model.inner.register_forward_hook(lambda module, inputs, output: output + 1)
        return attaching.attach_rule(rule, model, kinds, **options)

    monkeypatch.setattr(promises, "attach_rule", shift)
    assert {"forward", "copy", "detach"} <= sweep(HalfSpeed)


def test_a_change_of_a_gradient_left_alone_is_found(monkeypatch):
    def shift(rule, model, kinds="default", **options):
        model.inner.weight.register_hook(lambda gradient: gradient * (1 + 1e-9))
        return attaching.attach_rule(rule, model, kinds, **options)

    monkeypatch.setattr(promises, "attach_rule", shift)
    assert {"aside", "detach"} <= sweep(HalfSpeed)
    assert {"identity", "detach"} <= sweep(Backprop, is_backprop=True)


def test_a_copy_that_keeps_something_is_found(monkeypatch):
    class Sticky(nn.LayerNorm):
        def __deepcopy__(self, memo):
            copied = nn.LayerNorm(self.normalized_shape, dtype=self.weight.dtype)
            copied.weight.data = self.weight.detach() * (2 if self._forward_hooks else 1)
            return copied

    subject = make_subject(SAMPLE)
    subject.model.inner.__class__ = Sticky
    model = copy.deepcopy(subject.model)
    model.inner.__class__ = Sticky
    model.inner.register_forward_hook(lambda *_: None)
    report = Report()
    promises.check_copies(subject, model, report)
    assert "deepcopy" in report.problems[0].text


def test_checks_of_torch_find_a_false_identity(monkeypatch):
    from . import torch_checks

    monkeypatch.setattr(torch_checks, "Backprop", FalseGradient)
    report = Report()
    check_as_torch(SAMPLE, make_subject(SAMPLE), "default", report)
    found = {problem.check for problem in report.problems}
    assert {"test_forward", "test_to", "test_non_contiguous_tensors", "test_grad", "test_raising"} <= found
