"""Lightning's Fabric: a loop of the user's own, with its setup, backward, clipping, save and load."""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plywise import Rule

from .page import recipe
from .promises import Make, Promises, same_bits, trained
from .rules import RULES

pytestmark = [
    # Fabric's use of torch's private pytree, which torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # said of machines with a GPU
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

Attach = Callable[[Rule, nn.Module, Any, Any], None]


@pytest.fixture(autouse=True, scope="module")
def _lightning() -> None:
    """Only where its tests run: it takes seconds to import."""
    pytest.importorskip("lightning")


def attach_first(rule: Rule, model: nn.Module, optimizer: Any, load: Callable[[], None]) -> None:
    rule.attach(model, optimizer)
    load()


def load_first(rule: Rule, model: nn.Module, optimizer: Any, load: Callable[[], None]) -> None:
    load()
    rule.attach(model, optimizer)


def train(
    names: dict[str, Any],
    rule: Rule,
    epochs: int,
    done: int = 0,
    attach: Attach = attach_first,
    wrapper: bool = False,
) -> nn.Module:
    """The plain loop of docs/how-to/trainers.md, with Fabric."""
    from lightning.fabric import Fabric

    fabric, clip, accumulate = Fabric(accelerator="cpu", devices=1), names["clip"], names["accumulate"]
    model, path = names["make_model"](), Path(names["folder"]) / "fabric.ckpt"
    optimizer = names["make_optimizer"](model.parameters())
    scheduler = names["make_scheduler"](optimizer)
    net, wrapped = fabric.setup(model, optimizer)
    state = {"model": net, "optimizer": wrapped, "scheduler": scheduler}
    attach(rule, model, wrapped if wrapper else optimizer, lambda: fabric.load(path, state) if done else None)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(names["x"], names["y"]), names["batch_size"]))
    for _ in range(done, epochs):
        for i, (inputs, labels) in enumerate(loader, start=1):
            fabric.backward(nn.functional.cross_entropy(net(inputs), labels) / accumulate)
            if i % accumulate == 0:
                fabric.clip_gradients(net, wrapped, max_norm=clip, error_if_nonfinite=False)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
    fabric.save(path, state)
    return model


class TestFabric(Promises):
    section = "Fabric"

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        numbers = count()

        def made(section: str, **changes: Any) -> dict[str, Any]:
            names = recipe("Plain loop", folder=str(tmp_path / f"{next(numbers)}"), **changes)
            if section == self.section:
                names["train"] = partial(train, names)
            return names

        return made


@pytest.mark.parametrize("rule_name", RULES)
def test_loaded_before_attach(rule_name: str, tmp_path: Path) -> None:
    names = recipe("Plain loop", folder=str(tmp_path))
    unbroken = trained(names, RULES[rule_name]())
    train(names, RULES[rule_name](), 1)
    names["train"] = partial(train, names, attach=load_first)
    assert same_bits(trained(names, RULES[rule_name](), done=1), unbroken)


def test_the_wrapper_will_do_as_well(tmp_path: Path) -> None:
    # it has the hooks of what is inside, and an old state once something has been loaded
    names = recipe("Plain loop", folder=str(tmp_path))
    unbroken = trained(names, RULES["adabk"]())
    names["train"] = partial(train, names, wrapper=True)
    names["train"](RULES["adabk"](), 1)
    assert same_bits(trained(names, RULES["adabk"](), done=1), unbroken)
