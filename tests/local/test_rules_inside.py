"""Rules inside components: asked for no more than is used, absent where they fit nothing, named where not."""

import copy
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from moves import Recorded, backprop, batch, same_bits, tanh_blocks
from torch import nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.engine.health import NON_FINITE, SKIPPED


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def mixed_blocks():
    """Two blocks with a linear layer, between them one with batch norm alone and one without parameters."""
    blocks = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()),
        nn.AvgPool1d(2),
        nn.Linear(4, 3),
    )
    return [block.double() for block in blocks]


RULES = [lambda: pw.ProxProp(tau=1.0), lambda: pw.KFAC(stats_every=1, refresh_every=1)]


@pytest.mark.parametrize(
    "make",
    [
        *(partial(pw.Interlocking, num_classes=3, horizon=horizon) for horizon in (1, 2, 3, 9)),
        partial(pw.ActivationRelaxation, rate=0.5, iterations=7),
    ],
)
def test_each_layer_moves_once_a_step(make):
    """Gradients that only pass through a block on their way down cost no moves."""
    calls = Counter()

    class Counting(pw.ProxProp):
        def update(self, ply):
            calls[ply.weight.data_ptr()] += 1
            return super().update(ply)

    modules, (x, y) = tanh_blocks(), batch(9, 5)
    make(pw.Blocks(modules, x), optimizer=sgd, rule=Counting).step(x, y)
    assert {block.weight.data_ptr() for block in layers(modules)} <= calls.keys()
    assert set(calls.values()) == {1}


def layers(modules):
    return [module for block in modules for module in block.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("rule", RULES)
def test_a_block_without_a_layer_for_the_rule_follows_its_gradient(rule):
    modules, (x, y) = mixed_blocks(), batch(9, 5)
    whole = nn.Sequential(*copy.deepcopy(modules))
    attached = rule().attach(whole, sgd(list(whole.parameters())))
    cross_entropy(whole(x), y).backward()
    wanted = [p.grad for p in whole[1].parameters()]
    attached.detach()
    recorded = Recorded()
    learner = pw.ActivationRelaxation(
        pw.Blocks(modules, x), rate=1.0, iterations=1, optimizer=recorded, rule=rule
    )
    learner.step(x, y)
    assert same_bits(recorded.of([modules[1]]), wanted)
    assert [trainer.rule is None for trainer in learner.trainers] == [False, True, True, False]
    if isinstance(rule(), pw.ProxProp):
        assert not torch.allclose(
            recorded.gradients[modules[3].weight], backprop(modules, cross_entropy, x, y)[4]
        )


def test_explain_says_where_the_rule_is_and_why_not_elsewhere():
    modules, (x, _) = mixed_blocks(), batch(9, 5)
    blocks = pw.Blocks(modules, x)
    first, second, third, last = pw.ActivationRelaxation(
        blocks, optimizer=sgd, rule=lambda: pw.ProxProp(tau=1.0)
    ).explain()
    assert first.title.startswith("component 0: ProxProp(")
    assert [row.handled for table in (first, last) for row in table.rows] == [True, True]
    lines = str(second).split("\n")
    assert lines[0].startswith("0 % of 16 parameters handled, 0 of 1")
    assert lines[1] == "component 1: plain gradients on LossComponent"
    (row,) = second.rows
    assert (row.name, row.type, row.treatment) == ("block.0", "BatchNorm1d", "left to the optimizer")
    assert "its kind, 'norm', is left to the optimizer" in row.reason
    assert third.rows == []
    plain = pw.LocalLoss(pw.Blocks(tanh_blocks(), x), 3, optimizer=sgd).explain()
    assert {row.reason for table in plain for row in table.rows} == {"no rule is asked for"}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_any_layer_is_refused(rule):
    x = torch.randn(9, 3)
    blocks = pw.Blocks([nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Tanh()], x)
    with pytest.raises(
        pw.AttachError, match=r"no layer .* any component .*'block' of component 0: its kind, 'norm'"
    ):
        pw.ActivationRelaxation(blocks, optimizer=sgd, rule=rule)


@pytest.mark.parametrize("rule", [None, *RULES])
def test_a_step_that_is_not_finite_is_named_by_component(rule):
    """With a rule or without, and where the rule has nothing to do; the next step is taken."""
    modules, (x, y) = mixed_blocks(), batch(9, 5)
    learner = pw.ActivationRelaxation(pw.Blocks(modules, x), rate=1.0, iterations=1, optimizer=sgd, rule=rule)
    learner.step(x, y)
    before = [p.detach().clone() for module in modules for p in module.parameters()]
    bad = x.clone()
    bad[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learner.step(bad, y)
    texts = [str(one.message) for one in said]
    for index, name in enumerate(["block.0.weight", "block.0.weight", None, "block.weight"]):
        if name is not None:
            assert any(f"The gradient of component {index}: {name}, component {index}: " in t for t in texts)
            health = learner.trainers[index].health
            assert health.total(SKIPPED) == 1
            assert health.of(f"component {index}: {name}") == {NON_FINITE: 1}
    assert len(texts) == 3
    after = [p.detach().clone() for module in modules for p in module.parameters()]
    assert same_bits(after, before)
    for block in modules:  # what the NaN did to running statistics is not the question
        for module in block.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
    learner.step(x, y)
    assert not any(
        torch.equal(p, value)
        for p, value in zip((p for module in modules for p in module.parameters()), after, strict=True)
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_skipped_step_leaves_no_trace_in_the_rule(rule):
    """A run with a batch of NaN in it goes on as one without."""
    modules, (x, y), found = tanh_blocks(), batch(9, 5), []
    for bad_steps in (0, 1):
        copies = copy.deepcopy(modules)
        torch.manual_seed(1)
        learner = pw.LocalLoss(pw.Blocks(copies, x), 3, optimizer=sgd, rule=rule)
        learner.step(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(bad_steps):
                learner.step(torch.full_like(x, float("nan")), y)
        learner.step(x, y)
        found.append([p for block in copies for p in block.parameters()])
    assert same_bits(*found)
