"""Back-matching's measurement on networks that are not chains: several heads, reused and frozen layers."""

import threading
from functools import partial
from itertools import pairwise

import pytest
import torch
from backward_scales import collect_scales, compute_exactly, find_scales, read_kept
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import plywise as pw
from plywise.data.digits import load_digits

pytestmark = pytest.mark.usefixtures("double")


# ---- networks that are not chains -----------------------------------------------------------------------


class Heads(nn.Module):
    """Two heads on one trunk; each is used in some passes only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor, which: str = "both") -> tuple[Tensor, ...]:
        h = torch.tanh(self.trunk(x))
        return tuple(
            head(h) for name, head in (("one", self.one), ("two", self.two)) if which in (name, "both")
        )


def test_what_arrives_from_several_heads_adds_up():
    model, x = Heads(), torch.randn(2000, 6)
    scales = find_scales(model, x)
    assert scales["one"] == scales["two"] == [1]
    assert scales["trunk"] == [pytest.approx(compute_exactly(model, x, "trunk"), rel=0.05)]


def test_a_head_that_comes_later_is_measured_when_it_comes():
    model, x = Heads(), torch.randn(12, 6)
    optimizer = SGD(model.parameters(), lr=0.01)
    rule = pw.BackMatching().attach(model, optimizer)
    found = []
    for which in ("one", "one", "two", "both", "two"):
        optimizer.zero_grad()
        with collect_scales(rule) as scales:
            sum(out.square().sum() for out in model(x, which)).backward()
        optimizer.step()
        found.append(scales)
    assert (
        found[0]["trunk"] == found[1]["trunk"] == found[2]["trunk"]
    )  # the step's values are those before it
    assert found[3]["trunk"] == found[4]["trunk"] != found[2]["trunk"]
    assert all(scales.get("two", [1]) == [1] for scales in found)


def test_a_layer_that_no_measurement_has_met_counts_as_the_one_above():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.extra, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, is_long: bool) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(torch.tanh(self.extra(h)) if is_long else h)

    model, x = Gated(), torch.randn(12, 6)
    optimizer = SGD(model.parameters(), lr=0.01)
    rule = pw.BackMatching().attach(model, optimizer)
    found = []
    for is_long in (False, True, True, True):
        optimizer.zero_grad()
        with collect_scales(rule) as scales:
            model(x, is_long).square().sum().backward()
        optimizer.step()
        found.append(scales)
    assert found[1]["extra"] == found[1]["last"] == [1]
    assert found[2]["extra"] == found[3]["extra"] != [1]


def test_each_call_of_a_layer_has_its_own_value():
    """A layer that is called three times: the update is the sum of its calls' own, each over its ``E``."""
    torch.manual_seed(1)
    step, head = nn.Linear(8, 8, bias=False), nn.Linear(8, 30)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = step, head

        def forward(self, h: Tensor) -> Tensor:
            for _ in range(3):
                h = self.step(h)
            return self.head(h)

    model, x = Loop(), torch.randn(2000, 8)
    scales = find_scales(model, x)["step"]
    W, above = step.weight.detach(), head.weight.detach()
    for call, scale in enumerate(scales):  # in the order of backward
        J = above @ torch.linalg.matrix_power(W, call)
        assert scale == pytest.approx((J.square().sum() / 8).item(), rel=0.05)
    optimizer = SGD(model.parameters(), lr=0.0)
    rule = pw.BackMatching(cap=None).attach(model, optimizer)
    parts = []
    with rule.observing(lambda call, update, below: parts.append((call, update))):
        model(x).square().sum().backward()
    parts = [(call, update) for call, update in parts if call.name == "step"]
    assert [call.energy.item() for call, _ in parts] == scales
    assert torch.allclose(step.weight.grad, sum(update.weight for _, update in parts), rtol=1e-12)
    optimizer.step()
    assert read_kept(optimizer.state[step.weight]) == scales
    with collect_scales(rule) as again:
        model(x).square().sum().backward()
    assert again["step"] == scales


def test_frozen_layers_count_and_a_thawed_layer_goes_on():
    x, scales = torch.randn(12, 6), []
    for is_frozen in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        model[2:].requires_grad_(not is_frozen)
        optimizer = SGD(model.parameters(), lr=0.0)
        rule = pw.BackMatching().attach(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            with collect_scales(rule) as found:
                model(x).square().sum().backward()
            optimizer.step()
            scales.append(found)
            model[2:].requires_grad_(True)
    assert scales[0] == scales[1] == scales[2] == scales[3]


def test_checkpointing_changes_nothing():
    class Deep(nn.Module):
        def __init__(self, is_saving: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.last, self.is_saving = nn.Linear(6, 8), nn.Linear(8, 3), is_saving
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for block in self.blocks:
                h = h + (checkpoint(block, h, use_reentrant=False) if self.is_saving else block(h))
            return self.last(h)

    x = torch.randn(12, 6)
    assert find_scales(Deep(True), x) == find_scales(Deep(False), x)


def test_threads_do_not_disturb_each_other():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 12, 6)
    optimizer = SGD(model.parameters(), lr=0.0)
    pw.BackMatching().attach(model, optimizer)
    model(x[0]).square().sum().backward()
    optimizer.step()
    found: dict[int, tuple[Tensor, ...]] = {}

    def work(place: int) -> None:
        found[place] = torch.autograd.grad(model(x[place]).square().sum(), list(model.parameters()))

    for place in range(4):
        work(place)
    expected = dict(found)
    for _ in range(20):
        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place in range(4):
            assert all(map(torch.equal, found[place], expected[place]))


# ---- what it is good for -----------------------------------------------------------------------------


def test_digits_with_three_sigmoid_layers():
    """Fault 1k: what is not in a table counts, too; momentum SGD stands still at this depth."""
    torch.set_default_dtype(torch.float32)
    train = load_digits()[0]
    losses = {}
    for rule in (None, pw.BackMatching()):
        torch.manual_seed(0)
        widths = [64, 64, 64, 64]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Sigmoid())]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        if rule is not None:
            rule.attach(model, optimizer)
        for _ in range(6):
            for rows in torch.randperm(len(train.x)).split(64):
                optimizer.zero_grad()
                cross_entropy(model(train.x[rows]), train.y[rows]).backward()
                optimizer.step()
        losses[rule is None] = cross_entropy(model(train.x), train.y).item()
    assert losses[False] < 0.6
    assert losses[True] > 2.2


def test_a_selective_checkpoint_is_refused_by_name() -> None:
    """Its graph lets one backward through, and back-matching's rate needs another."""

    def keep(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            contexts = partial(create_selective_checkpoint_contexts, keep)
            return self.head(checkpoint(self.block, x, use_reentrant=False, context_fn=contexts))

    model = Saving()
    pw.BackMatching().attach(model)
    with pytest.raises(pw.PlywiseError, match=r"below layer 'head'.*selective checkpoint"):
        model(torch.randn(5, 6)).sum().backward()
