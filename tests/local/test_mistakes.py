"""Wrong arguments that are easily given: each is refused with a sentence that says what to give."""

import functools

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.local.forward_forward import write_label
from plywise.registry.names import LEARNER, NAMES

LEARNERS = [entry.name for entry in NAMES if entry.kind == LEARNER]
COUNTED = ("AssociatedLearning", "MonoForward", "CascadedForward")


def make_modules():
    return [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)]


def make(name="LocalLoss", blocks=None, **settings):
    kind = getattr(pw, name)
    count = {} if name in ("DirectFeedback", "ActivationRelaxation") else {"num_classes": 3}
    optimizer = {"optimizer": torch.optim.Adam}
    given = pw.Blocks(make_modules(), torch.randn(4, 8)) if blocks is None else blocks
    return kind(given, **(count | optimizer | settings))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_list_or_a_model_in_place_of_blocks(name):
    with pytest.raises(pw.BlockError, match=rf"{name} takes plywise\.Blocks; an object of type list"):
        make(name, make_modules())
    with pytest.raises(pw.BlockError, match=r"type Sequential was given. Cut a model by plywise\.split"):
        make(name, nn.Sequential(*make_modules()))


@pytest.mark.parametrize("given", [(torch.randn(4, 8), []), (nn.Linear(8, 3), torch.randn(4, 8)), (["a"], 1)])
def test_blocks_of_something_else_than_modules(given):
    with pytest.raises(pw.BlockError, match="Blocks takes modules in a row; an object of type"):
        pw.Blocks(*given)


def test_an_optimizer_scheduler_or_rule_in_place_of_a_function_that_makes_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for name, given in {"optimizer": optimizer, "scheduler": scheduler, "rule": pw.Foof()}.items():
        kind = type(given).__name__
        with pytest.raises(TypeError, match=f"{name} must be a function .*; an object of type {kind} was"):
            make(**{name: given})


def test_a_function_in_place_of_a_list_of_callbacks():
    with pytest.raises(TypeError, match="callbacks must be a list"):
        make(callbacks=print)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("count", [0, 2.5])
def test_a_number_of_classes_that_is_none(name, count):
    with pytest.raises(ValueError, match="num_classes must be a whole number above 0"):
        make(name, num_classes=count)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_number_of_classes_of_numpy(name):
    numpy = pytest.importorskip("numpy")
    count = {} if name in ("DirectFeedback", "ActivationRelaxation") else {"num_classes": numpy.int64(3)}
    shape, y = (4, 8), torch.tensor([0, 1, 2, 0])
    if name == "LocalNextToken":
        shape, y = (4, 5, 8), torch.tensor([[0, 1, 2, 0, 1]] * 4)
    x = torch.randn(shape)
    assert make(name, pw.Blocks(make_modules(), x), **count).step(x, y).isfinite().all()


def test_widths_and_numbers_of_bridges():
    make_learner = functools.partial(make, "AssociatedLearning")
    with pytest.raises(ValueError, match="code must be a whole number above 0"):
        make_learner(code=16.0)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"a list of {count} for 2 blocks"):
            make_learner(bridge=[pw.local.associated_learning.wide_bridge] * count)
    with pytest.raises(ValueError, match="skip must be a whole number"):
        make("ForwardForward", skip=0.5)


def test_another_number_of_classes_than_the_last_block_has_scores():
    with pytest.raises(pw.BlockError, match="or correct the number of classes"):
        make(num_classes=4)


def test_a_label_that_does_not_fit_into_an_input():
    assert write_label(torch.ones(2, 3), torch.tensor([0, 2]), 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(pw.PlywiseError, match="4 classes does not fit into inputs of 3 numbers"):
        write_label(torch.ones(2, 3), torch.tensor([0, 2]), 4)
