"""skorch's recipe, and what skorch and scikit-learn do to a net."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from plywise import AttachError

from .page import recipe
from .promises import EPOCHS, Promises, same_bits, trained, weights
from .rules import RULES


@pytest.fixture(autouse=True, scope="module")
def _skorch() -> None:
    """Only where its tests run: it takes seconds to import."""
    pytest.importorskip("skorch")


class TestSkorch(Promises):
    section = "skorch"


@pytest.fixture(params=RULES)
def rule_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    return recipe("skorch", folder=str(tmp_path))


def fitted(net: Any, names: dict[str, Any], epochs: int = EPOCHS) -> list[torch.Tensor]:
    net.set_params(max_epochs=epochs).fit(names["x"], names["y"])
    return weights(net.module_)


def test_without_accumulation_skorchs_own_step_and_scheduler(rule_name: str, tmp_path: Path) -> None:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import GradientNormClipping, LRScheduler

    names = recipe("skorch", folder=str(tmp_path), accumulate=1)
    names["Net"].get_loss = NeuralNetClassifier.get_loss
    names["Net"].train_step = NeuralNetClassifier.train_step  # steps with a closure
    net = names["make_net"](RULES[rule_name]())
    policy = LRScheduler(torch.optim.lr_scheduler.StepLR, step_every="batch", step_size=3, gamma=0.5)
    net.set_params(callbacks=[GradientNormClipping(names["clip"]), policy])
    plain = recipe("Plain loop", folder=str(tmp_path), accumulate=1)
    assert same_bits(fitted(net, names), trained(plain, RULES[rule_name]()))


def test_a_second_fit_and_set_params_attach_again(rule_name: str, names: dict[str, Any]) -> None:
    net, rule = names["make_net"](RULES[rule_name]()), RULES[rule_name]()
    first = fitted(net, names)
    assert same_bits(first, fitted(net, names))
    net.set_params(criterion__label_smoothing=0.1)  # keeps the module, makes a new optimizer
    other = names["make_net"](rule).set_params(criterion__label_smoothing=0.1).initialize()
    other.module_.load_state_dict(net.module_.state_dict())
    for each in (net, other):
        each.partial_fit(names["x"], names["y"], epochs=1)
    assert same_bits(weights(net.module_), weights(other.module_))
    assert not same_bits(weights(net.module_), first)


def test_a_clone_has_the_same_rule(rule_name: str, names: dict[str, Any]) -> None:
    from sklearn.base import clone

    net = names["make_net"](RULES[rule_name]())
    copied = clone(net)
    assert copied.rule is not net.rule
    assert str(copied.rule) == str(net.rule)
    assert same_bits(fitted(net, names), fitted(copied, names))


def test_a_copied_trained_net_says_that_its_rule_is_not_attached(
    rule_name: str, names: dict[str, Any]
) -> None:
    net = names["make_net"](RULES[rule_name]())
    fitted(net, names)
    with pytest.raises(AttachError, match="not attached"):
        _ = copy.deepcopy(net).rule.health
