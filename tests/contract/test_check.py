"""The contract as users call it: `check_rule` and `check_learner`, on what keeps it and on what breaks it."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.testing import Case, LearnerCase, check_learner, check_rule, list_promises

from .registry import DiagonalNewton


@dataclass(frozen=True, eq=False)
class Undamped(pw.Rule):
    """Divides by zero where a layer without bias sees zeros alone."""

    def update(self, call: pw.LinearCall) -> pw.Update:
        rate = 1 / call.trace().sum()
        return call.gradient().scaled(rate, rate)


@dataclass(frozen=True, eq=False)
class Silent(pw.Rule):
    """Answers nothing."""

    def update(self, call: pw.LinearCall) -> pw.Update:
        return None  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Counting(pw.Rule):
    """Counts its calls, though rules keep nothing."""

    count: list[int] = field(default_factory=lambda: [0])

    def update(self, call: pw.LinearCall) -> pw.Update:
        self.count[0] += 1
        return call.gradient().scaled(1 / self.count[0], 1 / self.count[0])


@dataclass(frozen=True, eq=False)
class Hoarding(pw.Rule):
    """Keeps what it is given."""

    kept: list[torch.Tensor] = field(default_factory=list)

    def update(self, call: pw.LinearCall) -> pw.Update:
        self.kept.append(call.delta)
        return call.gradient()


@dataclass(frozen=True, eq=False)
class Unbiased(pw.Rule):
    """Moves weights alone."""

    def update(self, call: pw.LinearCall) -> pw.Update:
        return pw.Update(call.gradient().weight, None)


@dataclass(frozen=True, eq=False)
class Failing(pw.Rule):
    """Looks for what is not there."""

    def update(self, call: pw.LinearCall) -> pw.Update:
        return {}[call.name]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Linear(pw.Rule):
    """Knows linear layers of float32 alone."""

    def update(self, call: pw.LinearCall) -> pw.Update:
        if call.a.dim() > 2 or call.a.dtype != torch.float32:
            raise NotImplementedError("only rows of float32")
        return call.gradient()


class Loose(pw.Rule):
    """No dataclass."""

    def __init__(self) -> None:
        self.rate = 0.5

    def update(self, call: pw.LinearCall) -> pw.Update:
        return call.gradient()


class Forgetful(pw.LocalLoss):
    """Goes on from somewhere else than what was saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        steps = self.steps
        super().load_state_dict(state)
        self.steps = steps


def test_a_rule_that_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    result = check_rule(DiagonalNewton, only=["scales"])
    assert torch.equal(torch.get_rng_state(), before)
    assert result.passed > 30
    assert not result.failed
    assert str(result).startswith(f"DiagonalNewton: {result.passed} passed, 0 failed, 0 left out")


@pytest.mark.parametrize("rule", [pw.Foof, pw.Coordinates])
def test_a_rule_that_seldom_gathers(rule: type[pw.Rule]) -> None:
    # as it is by default; the registry's own gathers in every second step
    assert check_rule(rule, only=["memory_batches"]).passed > 30


def test_a_rule_that_breaks_one() -> None:
    with pytest.raises(pw.ContractError, match=r"Undamped breaks \d+ of the contract's tests") as caught:
        check_rule(Undamped, only=["scales"])
    failed = caught.value.result.failed
    broken = [name for name in failed if "test_every_solve_ends[Undamped-zeros-convnet]" in name]
    assert len(broken) == 1
    assert "is not finite" in failed[broken[0]]
    assert broken[0].partition("::")[2] in str(caught.value)
    assert f"scales ({len(failed)} failed): {list_promises()['scales']}" in str(caught.value)


def test_a_rule_that_fails_everywhere_is_said_once() -> None:
    with pytest.raises(pw.ContractError) as caught:
        check_rule(Linear, only=["scales", "accumulation"])
    assert str(caught.value).count("NotImplementedError in test_check.py, line ") < 4
    assert "as above" in str(caught.value)
    assert "accumulation (" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 12


def test_a_rule_that_cannot_take_a_step_is_refused_at_once() -> None:
    before = torch.get_rng_state()
    with pytest.raises(pw.AttachError, match=r"Silent\.update must return a plywise\.Update, not NoneType"):
        check_rule(Silent)
    with pytest.raises(
        pw.PlywiseError, match=r"first step of Failing.* raised KeyError in test_check\.py, line"
    ):
        check_rule(Failing)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_that_differ_are_named() -> None:
    with pytest.raises(pw.ContractError) as caught:
        check_rule(Counting, only=["accumulation"])
    assert re.search(r"\d of \d tensors differ, first '\d\.weight', by up to [\d.e-]+", str(caught.value))


def test_a_rule_that_keeps_gradients() -> None:
    with pytest.raises(pw.ContractError, match="gradients at outputs are still kept after backward"):
        check_rule(Hoarding, only=["unmodified"])


def test_a_rule_that_forgets_the_bias() -> None:
    with pytest.raises(pw.ContractError, match="the update of '0' has no bias, and the layer has one"):
        check_rule(Unbiased, only=["shapes"])


def test_a_rule_that_is_no_dataclass_is_refused_at_once() -> None:
    with pytest.raises(pw.AttachError, match=r"Loose is not a dataclass.*with rate as fields"):
        check_rule(Loose)


def test_an_exemption_is_told_with_its_reason() -> None:
    case = Case("mine", DiagonalNewton, rates=(0.2,), not_homogeneous="for the sake of this test")
    result = check_rule(case, only=["accumulation"])
    assert "for the sake of this test" in str(result)
    assert result.skipped


def test_a_class_that_other_processes_cannot_import() -> None:
    @dataclass(frozen=True, eq=False)
    class Inner(DiagonalNewton):
        pass

    result = check_rule(Inner, only=["ddp"])
    assert result.passed == 0
    assert set(result.skipped.values()) == {"Inner is defined in a function, where no other process finds it"}


def test_learners() -> None:
    assert check_learner(pw.LocalLoss).passed > 15
    with pytest.raises(pw.ContractError, match="test_three_chained_resumes"):
        check_learner(Forgetful)
    result = check_learner(LearnerCase("deep", pw.LocalLoss, keeps_activations="for the sake of this test"))
    assert list(result.skipped.values()) == ["for the sake of this test"]


def test_what_cannot_be_checked() -> None:
    for factory in (3, nn.Linear(2, 2), lambda: 3):
        with pytest.raises(pw.PlywiseError, match=r"make a plywise\.Rule when it is called"):
            check_rule(factory)
    with pytest.raises(pw.PlywiseError, match=r"No promise is called 'scale'\. Did you mean scales"):
        check_rule(DiagonalNewton, only=["scale"])
    with pytest.raises(pw.PlywiseError, match="not int"):
        check_learner(3)


def test_every_promise_says_what_it_is() -> None:
    promises = list_promises()
    assert "learners" not in promises
    assert {"scales", "no_trace", "ddp", "memory_resume"} <= set(promises)
    assert all(text.endswith((".", "…")) for text in promises.values())
