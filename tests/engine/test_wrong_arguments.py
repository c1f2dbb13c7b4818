"""What is easily given in place of a model, an optimizer or a selector is refused with a way out."""

import re

import pytest
import torch
from small_nets import net, sgd
from torch import nn

import plywise as pw
from plywise import AttachError


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda model: model.parameters(), "generator"),
        (lambda model: list(model.parameters()), "list"),
        (sgd, "SGD"),
        (type, "the class Sequential"),
    ],
    ids=["parameters", "list", "optimizer", "class"],
)
def test_something_else_than_the_model(make, kind: str) -> None:
    model = net()
    said = f"torch.nn.Module as first argument, not {kind}. Write "
    for attach, call in (
        (pw.ProxProp().attach, "attach(model, optimizer)"),
        (pw.LayerFreezing().attach, "attach(model, optimizer)"),
        (lambda given, _: pw.recommend(given), "recommend(model, batch=x)"),
    ):
        with pytest.raises(AttachError, match=re.escape(f"{said}{call} with the model itself")):
            attach(make(model), sgd(model))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda model: torch.optim.SGD, "the class SGD"),
        (lambda model: model.parameters(), "generator"),
        (lambda model: torch.optim.lr_scheduler.StepLR(sgd(model), 1), "StepLR"),
    ],
    ids=["class", "parameters", "scheduler"],
)
def test_something_else_than_the_optimizer(make, kind: str) -> None:
    model = net()
    with pytest.raises(
        AttachError, match=rf"second argument, not {kind}\. Give it the object whose step\(\)"
    ):
        pw.ProxProp().attach(model, make(model))


def test_attach_of_the_class() -> None:
    model = net()
    with pytest.raises(AttachError, match=r"on the class of a rule, with Sequential in place of the rule"):
        pw.ProxProp.attach(model, sgd(model))


@pytest.mark.parametrize("name", ["layers", "exclude"])
def test_a_module_in_place_of_its_name(name: str) -> None:
    model = net()
    for given in (model[0], [model[0]]):
        with pytest.raises(AttachError, match=r"not Linear\. Write '0' in its place"):
            pw.ProxProp().attach(model, sgd(model), **{name: given})
    with pytest.raises(AttachError, match=r"not Linear\.\n"):
        pw.ProxProp().attach(model, sgd(model), **{name: nn.Linear(2, 2)})


@pytest.mark.parametrize("name", ["layers", "exclude"])
def test_what_selects_nothing(name: str) -> None:
    model = net()
    for given, kind in (
        (0, "int"),
        ([0], "int"),
        (model[0].weight, "Parameter"),
        (model.parameters(), "Par"),
    ):
        with pytest.raises(AttachError, match=f"classes of modules, functions of .*, not {kind}"):
            pw.ProxProp().attach(model, sgd(model), **{name: given})


def test_an_iterator_of_names_is_a_list_of_them() -> None:
    model = net()
    rule = pw.ProxProp().attach(model, sgd(model), exclude=(name for name in ("0",)))
    for _ in range(2):  # new parameters make the rule choose again
        assert {row.name: row.handled for row in rule.explain().rows} == {"0": False, "2": True}
        model[2].weight = nn.Parameter(torch.zeros(3, 8))
        with rule.paused():
            model(torch.ones(1, 6))
    rule.detach()


@pytest.mark.parametrize(
    ("given", "said"),
    [(nn.Linear, "<class '.*Linear'>"), ([], "an empty list"), (3, "3"), (["conv", 3], "3")],
)
def test_kinds_that_are_none(given, said: str) -> None:
    model = net()
    with pytest.raises(
        ValueError, match=rf"kinds must be .*, not {said}\. To choose layers by name or class"
    ):
        pw.ProxProp().attach(model, sgd(model), kinds=given)


def test_a_reason_is_given_once_for_all_weights_of_a_layer() -> None:
    with pytest.raises(AttachError) as raised:
        pw.ProxProp().attach(nn.LSTM(4, 4))
    assert str(raised.value).count("fused kernels") == 1


def test_callbacks_and_observers_are_functions() -> None:
    model = net()
    rule = pw.ProxProp().attach(model, sgd(model))
    for given, said in ((print, "not a function"), (3, "not int"), ("tb", "not str"), (["tb"], "'tb' in it")):
        with pytest.raises(TypeError, match=f"ProxProp: callbacks must be a list of functions.*{said}"):
            rule.record(callbacks=given)
    with (
        pytest.raises(TypeError, match=r"ProxProp: observer must be a function of \(call, update, below\)"),
        rule.observing("layer"),
    ):
        pass
    rule.detach()


def test_a_layer_or_number_that_was_not_measured_is_named() -> None:
    model = net()
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    history = rule.record(every=1)
    assert history.read("3", "angle") == ([], [])  # nothing has been measured yet
    model(torch.ones(4, 6)).square().sum().backward()
    optimizer.step()
    assert history.read("2", "angle")[0] == [1]
    with pytest.raises(pw.PlywiseError, match=r"No measured step has a layer '3'\. There are: '0', '2'\."):
        history.read("3", "angle")
    with pytest.raises(pw.PlywiseError, match=r"A layer has no number 'angel'; it has: .*angle"):
        history.read("2", "angel")
    rule.detach()
