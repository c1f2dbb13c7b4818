"""Lightning's recipe."""

from pathlib import Path
from typing import Any, Self

import pytest
from torch import nn

from plywise import ProxProp

from .page import recipe
from .promises import Promises, same_bits, trained, weights

pytestmark = [
    # Lightning's use of torch's private pytree, which torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # a resumed run writes its checkpoints beside the first one's
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # said of machines with more cores, or with a GPU
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


@pytest.fixture(autouse=True, scope="module")
def _lightning() -> None:
    """Only where its tests run: it takes seconds to import."""
    pytest.importorskip("lightning")


class TestLightning(Promises):
    section = "Lightning"


def test_a_second_fit_attaches_again(tmp_path: Path) -> None:
    names = recipe("Lightning", folder=str(tmp_path))
    rule = ProxProp()
    first = weights(names["train"](rule, 2))
    assert same_bits(first, weights(names["train"](rule, 2)))


def test_part_of_the_module(tmp_path: Path) -> None:
    class OnlyTheNet(ProxProp):
        def attach(self, model: nn.Module, *others: Any) -> Self:
            assert [name for name, _ in model.named_children()] == ["net"]
            return super().attach(model.net, *others)

    results = [
        trained(recipe("Lightning", folder=str(tmp_path / str(i))), rule)
        for i, rule in enumerate([ProxProp(), OnlyTheNet()])
    ]
    assert same_bits(*results)
