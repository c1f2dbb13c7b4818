"""Promises 12 and 13 for one model under one rule.

The checks, by the names under which a report counts them:

- ``identity``: under `plywise.Backprop` every gradient is plain autograd's, and nothing is refused;
- ``aside``: parameters that the rule leaves alone have plain gradients to the last bit, unless a layer above
  sends another value down;
- ``aside_below``: the same below a layer that does (promise 12 without its exception);
- ``error``: nothing raises but our own errors, and ``readable``: those are sentences that help;
- ``forward``: outputs are the same to the last bit;
- ``copy``: the attached model copies and pickles, and the copy has no rule;
- ``explain``: the table prints and names the module;
- ``detach``: after it all is plain to the last bit;
- ``acts``: a rule that halves every gradient halves those of all parameters that it says it handles;
- ``finite``: finite plain gradients stay finite.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from plywise import Backprop, Rule
from plywise.testing.cases import Case

from .attaching import HalfSpeed, attach_rule, find_handled, is_altering, warm_up
from .database import Sample, copy_arguments, find_reason_to_skip
from .host import make_host
from .passes import Pass, UnusableError, find_difference, is_finite, run_pass, same_bits
from .report import Report


@dataclass
class Subject:
    """A model, its arguments, and what plain autograd makes of them."""

    label: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    alone: bool = False
    plain: Pass = field(init=False)

    def __post_init__(self) -> None:
        """Raise `UnusableError` if plain torch cannot run it, or not twice alike."""
        try:
            self.plain = self.run(self.model)
            again = self.run(self.model)
        except UnusableError:
            raise
        except Exception as error:
            raise UnusableError(f"plain torch raises {type(error).__name__}") from error
        if not is_finite(self.plain):
            raise UnusableError("plain gradients are not finite")
        if find_difference(again, self.plain) or not same_outputs(again, self.plain):
            raise UnusableError("plain torch gives other numbers the second time")

    @cached_property
    def copiers(self) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """The ways in which plain torch can copy the model."""
        return {name: make for name, make in COPIERS.items() if can_copy(self.model, make)}

    def run(self, model: nn.Module) -> Pass:
        return run_pass(model, self.args, self.kwargs)


def make_subject(sample: Sample, *, alone: bool = False) -> Subject:
    """The sample's module between linear layers, or alone."""
    reason = find_reason_to_skip(sample, "test_forward")
    if reason is not None:
        raise UnusableError(reason)
    model = make_host(sample, alone=alone)
    args, kwargs = copy_arguments(sample)
    return Subject(f"{sample}{' alone' if alone else ''}", model, args, kwargs, alone)


def check_rule(subject: Subject, case: Case, kinds: str, report: Report, *, copies: bool = True) -> None:
    """All promises for a fresh copy of the subject's model under a fresh rule; ``copy`` if wanted."""
    report.subject, report.rule = subject.label, f"{case.name} kinds={kinds}"
    model, rule = copy.deepcopy(subject.model), case.make()
    with report.catching(subject.alone or not case.is_backprop):
        optimizer = attach_rule(rule, model, kinds)
        report.record("explain", find_fault_of_explanation(rule, model))
        warm_up(rule, model, optimizer, subject.args, subject.kwargs)
        during = subject.run(model)
        compare(subject, during, rule, model, case, kinds, report)
        optimizer.step()
        report.record("explain", find_fault_of_explanation(rule, model))
    if copies:
        with report.catching(subject.alone, "copy"):
            check_copies(subject, model, report)
    with report.catching(False, "detach"):
        rule.detach()
        report.record("detach", find_any_difference(subject.run(model), subject.plain))
    if is_altering(case.name, kinds):
        check_below_first_layer(subject, case, kinds, report)


def compare(
    subject: Subject, during: Pass, rule: Rule, model: nn.Module, case: Case, kinds: str, report: Report
) -> None:
    """Outputs and gradients under a rule against the plain ones."""
    handled = find_handled(rule, model)
    report.record("forward", None if same_outputs(during, subject.plain) else "outputs differ")
    report.record("finite", None if is_finite(during) else f"not finite: {find_not_finite(during)}")
    if case.is_backprop:
        report.record("identity", find_difference(during, subject.plain, handled | during.inputs.keys()))
    if isinstance(rule, HalfSpeed):
        report.record(
            "acts", find_difference(during, halve(subject.plain, handled), handled | during.inputs.keys())
        )
    left = [name for name in during.parameters if name not in handled]
    if left:
        check = "aside_below" if is_altering(case.name, kinds) else "aside"
        report.record(check, find_difference(keep_only(during, left), keep_only(subject.plain, left)))


def check_below_first_layer(subject: Subject, case: Case, kinds: str, report: Report) -> None:
    """A rule that alters what it sends down handles the lowest layers only: all above stays plain."""
    if not any(name.startswith("before.") for name, _ in subject.model.named_parameters()):
        return report.skip("no layer below the module: what is above an altering rule is not checked")
    model, rule = copy.deepcopy(subject.model), case.make()
    with report.catching(True):
        optimizer = attach_rule(rule, model, kinds, layers="before.*")
        warm_up(rule, model, optimizer, subject.args, subject.kwargs)
        during = subject.run(model)
        left = [name for name in during.parameters if not name.startswith("before.")]
        report.record("aside", find_difference(keep_only(during, left), keep_only(subject.plain, left)))
    rule.detach()
    return None


def check_copies(subject: Subject, model: nn.Module, report: Report) -> None:
    """Copies of the model as it is now have no rule, and another rule may have them."""
    if not subject.copiers:
        return report.skip("plain torch cannot copy the model")
    for name, make in subject.copiers.items():
        made = make(model)
        problem = find_any_difference(subject.run(made), subject.plain)
        report.record("copy", problem and f"{name}: {problem}")
    second = Backprop()
    attach_rule(second, made)
    second.detach()
    return None


def copy_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIERS = {"deepcopy": copy.deepcopy, "pickle": copy_by_pickle}


def can_copy(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> bool:
    try:
        make(model)
    except Exception:
        return False
    return True


def find_fault_of_explanation(rule: Rule, model: nn.Module) -> str | None:
    """Why the table of `Rule.explain` is of no use, or None."""
    text = str(rule.explain())
    for name, child in model.named_children():
        if name not in text and any(True for _ in child.parameters()):
            return f"explain() does not name {name!r}:\n{text}"
    return None


def keep_only(result: Pass, names: list[str]) -> Pass:
    return Pass([], {name: result.parameters[name] for name in names}, {})


def halve(result: Pass, names: set[str]) -> Pass:
    """The same pass with the gradients of these parameters at half their size."""
    halved = {
        name: gradient * 0.5 if name in names and gradient is not None else gradient
        for name, gradient in result.parameters.items()
    }
    return Pass(result.outputs, halved, result.inputs)


def same_outputs(one: Pass, two: Pass) -> bool:
    return len(one.outputs) == len(two.outputs) and all(map(same_bits, one.outputs, two.outputs))


def find_any_difference(got: Pass, plain: Pass) -> str | None:
    """Any difference to the last bit, of outputs too."""
    return find_difference(got, plain) if same_outputs(got, plain) else "outputs differ"


def find_not_finite(result: Pass) -> str:
    gradients = {**result.parameters, **result.inputs}
    return ", ".join(name for name, g in gradients.items() if g is not None and not g.isfinite().all())
