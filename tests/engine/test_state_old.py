"""Checkpoints of plywise 0.1.0 load: their statistics were beside the optimizer's state, by layer names.

``saved_by_0_1_0.pt`` was written by that version: for each rule the states after five steps, and the weights
after four more.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from state_runs import RULES, Run
from torch import nn
from torch.optim import SGD, Optimizer

from plywise import Foof, StateError
from plywise.testing.contract.memories import list_layers
from plywise.testing.contract.models import assert_close, have_same_bits
from plywise.testing.contract.models import make_batch as make_batch

SAVED = Path(__file__).with_name("saved_by_0_1_0.pt")
NAMES = ("rls", "foof", "adabk")


def make_optimizer(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def make_model() -> nn.Module:
    parts = [nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*parts)


def step(run: Run, number: int) -> None:
    x, y = make_batch((1, 3, 3), 4, torch.float32, 40 + number)
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()


@pytest.fixture
def saved() -> dict[str, Any]:
    return torch.load(SAVED, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_goes_on(name: str, saved: dict[str, Any]) -> None:
    state = saved[name]
    run = Run(RULES[name](), make_optimizer, model=make_model())
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    (entry,) = state["optimizer"]["plywise"]
    found = run.copy_memory()
    for layer, tensors in entry["layers"].items():
        for key, value in tensors.items():
            assert torch.equal(found[f"{entry['rule']}/{layer}/{key}"], value)
    assert int(found[f"{entry['rule']}/step"]) == 5
    for number in range(5, 9):
        if number == 7:  # and in the new form
            other = Run(RULES[name](), make_optimizer, model=make_model())
            other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
            other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
            run = other
        step(run, number)
    # 0.2 gathers for all layers in the same step; where each had a step of its own, the path is a near one
    assert_close(dict(run.model.state_dict()), state["after"], 0.1 if name == "foof" else 1e-5)


def test_wrapped_names_of_old_checkpoints_load(saved: dict[str, Any]) -> None:
    # that version named layers as the wrapper did to which the rule was attached
    state = saved["foof"]["optimizer"]
    (entry,) = state["plywise"]
    entry["layers"] = {f"module._orig_mod.{name}": tensors for name, tensors in entry["layers"].items()}
    run = Run(RULES["foof"](), make_optimizer, model=make_model())
    run.optimizer.load_state_dict(state)
    assert list_layers(run.copy_memory()) == {"0", "2", "4"}


def test_several_rules_of_old_checkpoints_load(saved: dict[str, Any]) -> None:
    state = saved["foof"]["optimizer"]
    (entry,) = state["plywise"]
    layers = entry["layers"]
    state["plywise"] = [{**entry, "layers": {n: layers[n] for n in names}} for names in (("2", "4"), ("0",))]
    run = Run(RULES["foof"](), make_optimizer, model=make_model(), attach=False)
    rules = [RULES["foof"]().attach(run.model, run.optimizer, layers="0")]
    rules.append(RULES["foof"]().attach(run.model, run.optimizer, exclude="0"))
    run.optimizer.load_state_dict(state)
    assert list_layers(run.copy_memory()) == {"0", "2", "4"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.update(rule="RLS"), "saved with RLS, and the rule attached is Foof"),
        (lambda entry: entry["layers"].update(other={}), "of another model: it also has 'other'"),
        (lambda entry: entry["layers"]["4"].pop("rows"), "layer '4' does not fit.*'rows' is missing"),
    ],
    ids=["another rule", "another model", "other settings"],
)
def test_old_checkpoints_that_do_not_fit_are_refused(change: Any, words: str, saved: dict[str, Any]) -> None:
    state = saved["foof"]["optimizer"]
    change(state["plywise"][0])
    run = Run(RULES["foof"](), make_optimizer, model=make_model())
    step(run, 0)
    before = run.copy_state()
    with pytest.raises(StateError, match=words):
        run.optimizer.load_state_dict(state)
    assert have_same_bits(run.copy_state(), before)


def test_an_old_checkpoint_loaded_before_attach_is_noticed(saved: dict[str, Any]) -> None:
    # torch keeps only what is in "state"
    run = Run(Foof(), make_optimizer, model=make_model(), attach=False)
    run.optimizer.load_state_dict(saved["foof"]["optimizer"])
    with pytest.warns(RuntimeWarning, match=r"no statistics of Foof.*attach the rule first.*plywise 0\.1"):
        run.attach()
    assert not run.copy_memory()
