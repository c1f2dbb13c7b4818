"""What the contract's tests leave to the rules that ship: their own settings, and the list of the tests."""

import copy
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from torch import nn

import plywise.testing
from plywise import (
    NLMS,
    AttachError,
    BackMatching,
    Backprop,
    Consequentialism,
    Foof,
    PlywiseError,
    Precondition,
    ProxProp,
    Rule,
    StatefulRule,
    register_layer,
)
from plywise.testing.cases import Case, make_case
from plywise.testing.contract.memories import start
from plywise.testing.contract.models import compute_gradients, have_same_bits, make_batch, make_mlp
from plywise.testing.contract.test_layer_configurations import BRIEF, Drawn, check, draw_convolution
from plywise.testing.contract.test_memory_resume import assert_refused

from .registry import CASES, DiagonalNewton, selected


def test_every_file_of_the_contract_is_run_here() -> None:
    theirs = {path.name for path in (Path(plywise.testing.__file__).parent / "contract").glob("test_*.py")}
    ours = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {"test_shipped.py"}
    assert ours - {"test_check.py", "test_check_learner.py"} == theirs
    for name in theirs:
        stub = (Path(__file__).parent / name).read_text(encoding="utf-8")
        assert f"\nfrom plywise.testing.contract.{name.removesuffix('.py')} import *\n" in stub


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


def test_plywise_errors_are_runtime_errors() -> None:
    assert issubclass(AttachError, PlywiseError)
    assert issubclass(PlywiseError, RuntimeError)


SETTINGS: list[tuple[StatefulRule, StatefulRule]] = [
    (Foof(rank=2), Foof()),
    (Foof(), Foof(rank=2)),
    (Precondition(left=0.5), Precondition()),
    (Precondition(), Precondition(left=0.5)),
    (Precondition(max_size=7), Precondition()),
]


@pytest.mark.parametrize(("saved", "loaded"), SETTINGS, ids=str)
def test_other_settings(saved: StatefulRule, loaded: StatefulRule) -> None:
    state = copy.deepcopy(start(Case("saved", lambda: saved), steps=2).optimizer.state_dict())
    assert_refused(
        start(Case("loaded", lambda: loaded), steps=1), state, r"layer '[024]' does not fit.*other settings"
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(BRIEF, max_examples=150)
@given(drawn=draw_convolution())
def test_backprop_is_autograd_on_any_convolution(drawn: Drawn) -> None:
    check(CASES[0], drawn.layer(), drawn.layer(), drawn.input(), drawn.input())


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
    with pytest.raises(PlywiseError, match=r"module:name, as in .*not 'my_rules'"):
        make_case("my_rules")
    with pytest.raises(PlywiseError, match="my_rules:wrong must be"):
        make_case("my_rules:wrong")


def test_the_users_own_rule_does_what_it_says() -> None:
    # the registry's proof is a rule unlike all others: it moves and tells the layer below its own values
    data, model, plain = make_batch(), make_mlp(), make_mlp()
    found, expected = {}, compute_gradients(plain, data)
    rule = DiagonalNewton().attach(model)
    found = compute_gradients(model, data)
    rule.detach()
    assert not have_same_bits(found, expected)
