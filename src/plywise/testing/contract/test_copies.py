"""deepcopy and pickle of the model are free of plywise; a copied rule is its hyper-parameters."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from plywise import AttachError, Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    compute_gradients,
    compute_loss,
    copy_weights,
    have_same_bits,
    make_batch,
    make_convnet,
    make_mlp,
    save_and_load,
    train,
)

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: save_and_load(model, weights_only=False),
    "twice": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "averaged": lambda model: AveragedModel(model).module,
}


def from_plywise(model: nn.Module) -> list[object]:
    """Objects of plywise that hang on a model."""
    found = []
    for module in model.modules():
        for value in vars(module).values():
            found += list(value.values()) if isinstance(value, dict) else [value]
        for parameter in module.parameters(recurse=False):
            found += list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
    return [item for item in found if type(item).__module__.partition(".")[0] == "plywise"]


@pytest.mark.one_of_family
@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_of_an_attached_model_is_plain(rule: Rule, how: str) -> None:
    data, model = make_batch((2, 6, 6)), make_convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule.attach(model, optimizer)
    train(model, optimizer, data, 1)
    assert from_plywise(model)  # the measure can see them
    copied = COPIES[how](model)
    assert from_plywise(copied) == []
    plain = make_convnet()
    plain.load_state_dict(model.state_dict())
    assert have_same_bits(copy_weights(copied), copy_weights(plain))
    for net in (copied, plain):
        net.zero_grad()
        train(net, torch.optim.Adam(net.parameters(), lr=0.01), data, 3)
    assert have_same_bits(copy_weights(copied), copy_weights(plain))


@pytest.mark.one_of_family
@pytest.mark.parametrize("how", list(COPIES))
def test_the_original_and_an_attached_copy_go_on(case: Case, rule: Rule, how: str) -> None:
    data, model = make_batch(), make_mlp()
    attach(rule, model, warm=(6,))
    expected = compute_gradients(model, data)
    copied = COPIES[how](model)
    assert have_same_bits(compute_gradients(model, data), expected)
    other = attach(case.make(), copied, warm=(6,))
    assert have_same_bits(compute_gradients(copied, data), expected)
    other.detach()
    plain = make_mlp()
    assert have_same_bits(compute_gradients(copied, data), compute_gradients(plain, data))


def test_an_attached_optimizer_copies_and_pickles(rule: Rule) -> None:
    data, model = make_batch(), make_mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rule.attach(model, optimizer)
    train(model, optimizer, data, 1)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not [name for name, value in vars(copied).items() if "_hooks" in name and value]
        assert "plywise" not in copied.state_dict()
    dumped = pickle.dumps((model, optimizer))
    assert b"plywise." not in dumped.replace(b"plywise." + type(rule).__name__.encode(), b"").replace(
        b"plywise.backward_scale", b""
    )  # keys of the optimizer's state, but no classes
    together, stepper = copy.deepcopy((model, optimizer))
    assert stepper.param_groups[0]["params"][0] is together[0].weight
    train(together, stepper, data, 1)


def test_state_dicts_load_with_weights_only(rule: Rule) -> None:
    model = make_convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule.attach(model, optimizer)
    train(model, optimizer, make_batch((2, 6, 6)), 2)
    state = save_and_load({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    plain = make_convnet()
    plain.load_state_dict(state["model"])  # strict: no key too many or too few
    torch.optim.AdamW(plain.parameters(), lr=0.01).load_state_dict(state["optimizer"])
    assert have_same_bits(copy_weights(plain), copy_weights(model))


READER = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "plywise":
            raise ImportError("no plywise here")

sys.meta_path.insert(0, Block())
import pickle
import torch
torch.set_num_threads(1)
from torch import nn
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    hook_count = len(model[0]._forward_hooks)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.ones(4, 6)).sum().backward()
    assert model[0].weight.grad is not None
    assert len(seen) == 1 and len(model[0]._forward_hooks) == hook_count + 1
    print(path, float(model[0].weight.grad.sum()), sep="\t")
assert "plywise" not in sys.modules
"""


@pytest.fixture(scope="module")
def read_without_plywise(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What a process that cannot import plywise makes of one pickled attached model for each rule."""
    folder = tmp_path_factory.mktemp("pickles")
    for number, case in enumerate(cases):
        model = make_mlp()
        rule = case.make().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model.zero_grad()
        torch.save(model, folder / f"{number}.pt")
        rule.detach()
    script = folder / "reader.py"
    script.write_text(READER)
    paths = sorted(map(str, folder.glob("*.pt")))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script), *paths],
        capture_output=True, text=True, timeout=120, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {Path(path).stem: float(value) for path, value in lines}


def test_the_pickle_loads_without_plywise(
    case: Case, read_without_plywise: dict[str, float], cases: list[Case]
) -> None:
    plain = make_mlp()
    plain(torch.ones(4, 6)).sum().backward()
    names = [one.name for one in cases]
    found = read_without_plywise[str(names.index(case.name))]
    assert found == pytest.approx(float(plain[0].weight.grad.sum()), rel=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "copy", pytest.param("pickle", marks=pytest.mark.sends_rule)])
def test_a_copied_rule_is_its_hyper_parameters(case: Case, rule: Rule, how: str) -> None:
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    copied = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda r: pickle.loads(pickle.dumps(r)),
    }[how](rule)
    assert type(copied) is type(rule)
    assert copied is not rule
    for field in fields(rule):
        assert getattr(copied, field.name) == getattr(rule, field.name)
    assert str(copied) == str(rule)
    with pytest.raises(AttachError, match="is not attached"):
        copied.explain()
    copied.detach()  # does nothing to the original
    other = make_mlp()
    attach(copied, other, warm=(6,))
    assert have_same_bits(compute_gradients(other, data), compute_gradients(model, data))
    copied.detach()
    compute_loss(model, data)
