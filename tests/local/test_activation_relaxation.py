"""Activation Relaxation against its definition, and against backpropagation, in float64."""

import copy
import math

import pytest
import torch
from moves import Recorded, backprop, batch, conv_blocks, moves, relative, same_bits, tanh_blocks
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import plywise as pw


def relaxing(blocks, **settings):
    return pw.ActivationRelaxation(blocks, **settings)


def summed(out, target):
    """The paper's loss."""
    return mse_loss(out, target, reduction="sum")


def definition(layers, x, target, rate, iterations):
    """The authors' loop for tanh layers and a linear one, by matrices: moves of weights and biases."""
    weights, biases = [m.weight.detach() for m in layers], [m.bias.detach() for m in layers]
    s, slopes = [x], []
    for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
        pre = s[-1] @ W.T + b
        last = i == len(weights) - 1
        s.append(pre if last else pre.tanh())
        slopes.append(torch.ones_like(pre) if last else 1 - pre.tanh() ** 2)
    heard = [*(a.clone() for a in s[1:-1]), 2 * (s[-1] - target)]
    for _ in range(iterations):
        for i in reversed(range(len(heard) - 1)):
            below = (heard[i + 1] * slopes[i + 1]) @ weights[i + 1]
            heard[i] = heard[i] - rate * (heard[i] - below)
    found = []
    for a, e, slope in zip(s, heard, slopes, strict=False):
        found += [(e * slope).T @ a, (e * slope).sum(0)]
    return found


@pytest.mark.parametrize(("rate", "iterations"), [(0.1, 1), (0.1, 7), (0.5, 3), (1.0, 1), (1.7, 4)])
def test_definition(rate, iterations):
    modules, (x, _) = tanh_blocks(), batch(9, 5)
    target = torch.randn(9, 3, dtype=torch.float64)
    layers = [m for block in modules for m in block.modules() if isinstance(m, nn.Linear)]
    wanted = definition(layers, x, target, rate, iterations)
    found = moves(relaxing, modules, x, target, loss=summed, rate=rate, iterations=iterations)
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("iterations", [1, 3])
def test_rate_one_is_backpropagation(iterations):
    """After a single sweep, for it goes from the top down."""
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    wanted = backprop(modules, cross_entropy, x, y)
    found = moves(relaxing, modules, x, y, rate=1.0, iterations=iterations)
    assert relative(found, wanted) < 1e-12


def test_backpropagation_of_convolutions():
    """Batch norm, blocks that begin in place, one without parameters; no dropout."""
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    for module in nn.ModuleList(modules).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wanted = backprop(copy.deepcopy(modules), cross_entropy, x, y)
    assert relative(moves(relaxing, modules, x, y, rate=1.0, iterations=1), wanted) < 1e-12


def test_dropout_is_that_of_every_learner():
    """Masks depend on the seed, the block and the step alone."""
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    end_to_end = pw.Interlocking(pw.Blocks(copy.deepcopy(modules), x), 3, horizon=5, optimizer=Recorded())
    learner = relaxing(pw.Blocks(modules, x), optimizer=Recorded(), rate=1.0, iterations=1)
    for _ in range(3):
        wanted = end_to_end.step(x, y)[-1:]
        assert relative(learner.step(x, y)[-1:], wanted) < 1e-12


def test_one_block_is_backpropagation():
    network, (x, y) = nn.Sequential(*tanh_blocks()), batch(9, 5)
    wanted = backprop([network], cross_entropy, x, y)
    assert same_bits(moves(relaxing, [network], x, y, rate=0.3, iterations=2), wanted)


def test_the_error_falls_with_the_sweeps():
    """Rate .1, four layers, a summed loss."""
    modules, (x, _) = tanh_blocks(), batch(64, 5)
    target = torch.randn(64, 3, dtype=torch.float64)
    wanted = backprop(modules, summed, x, target)

    def error(iterations):
        found = moves(relaxing, copy.deepcopy(modules), x, target, loss=summed, iterations=iterations)
        return relative(found, wanted)

    assert error(10) > 0.5
    assert 1e-4 < error(100) < 2e-2
    assert 1e-8 < error(200) < 2e-6
    assert error(400) < 1e-12


def test_a_mean_starts_farther_off_than_a_sum():
    """By the number that the loss is divided by; ``ln(N) / rate`` sweeps make up for it."""
    modules, (x, _) = tanh_blocks(), batch(64, 5)
    target = torch.randn(64, 3, dtype=torch.float64)

    def error(loss, iterations):
        wanted = backprop(modules, loss, x, target)
        return relative(
            moves(relaxing, copy.deepcopy(modules), x, target, loss=loss, iterations=iterations), wanted
        )

    assert error(mse_loss, 100) > 50 * error(summed, 100)
    assert error(mse_loss, 100 + round(math.log(64 * 3) / 0.1)) < 5 * error(summed, 100)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_rule_backprop_changes_no_bit(rate):
    modules, (x, y), found = tanh_blocks(), batch(9, 5), []
    for rule in (None, pw.Backprop):
        settings = {"rule": rule, "rate": rate, "iterations": 3}
        found.append(moves(relaxing, copy.deepcopy(modules), x, y, **settings))
    assert same_bits(*found)


def test_relaxation_settles_at_what_the_rule_hands_down():
    """Under ProxProp, and under exact back-matching, whose blocks receive something else than gradients."""
    modules, (x, y) = tanh_blocks(), batch(32, 5)
    plain = backprop(modules, cross_entropy, x, y)
    for make_rule in (lambda: pw.ProxProp(tau=1.0), lambda: pw.BackMatching(mode="exact", cap=None)):
        whole = nn.Sequential(*copy.deepcopy(modules))
        rule = make_rule().attach(whole)
        cross_entropy(whole(x), y).backward()
        rule.detach()
        settings = {"rule": make_rule, "rate": 0.5, "iterations": 100}
        found = moves(relaxing, copy.deepcopy(modules), x, y, **settings)
        assert relative(found, [p.grad for p in whole.parameters()]) < 1e-10
        assert relative(found, plain) > 0.01


def test_frozen_blocks_let_gradients_through():
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    wanted = backprop(modules, cross_entropy, x, y)
    for frozen in range(4):
        copies = copy.deepcopy(modules)
        copies[frozen].requires_grad_(False)
        found = moves(relaxing, copies, x, y, rate=1.0, iterations=1)
        assert found[2 * frozen : 2 * frozen + 2] == [None, None]
        del found[2 * frozen : 2 * frozen + 2]
        assert same_bits(found, [g for i, g in enumerate(wanted) if i // 2 != frozen])


def test_one_loss_for_all():
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    learner = relaxing(pw.Blocks(modules, x), optimizer=Recorded(rate=0.5), rate=1.0, iterations=1)
    losses = [learner.step(x, y) for _ in range(40)]
    assert all((row == row[-1]).all() and len(row) == 5 for row in losses)
    assert losses[-1][0] < losses[0][0] / 2


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 2.0}, {"iterations": 0}, {"iterations": 2.5}])
def test_settings_out_of_range(settings):
    x, _ = batch(9, 5)
    with pytest.raises(ValueError, match=next(iter(settings))):
        relaxing(pw.Blocks(tanh_blocks(), x), optimizer=Recorded(), **settings)


def test_a_network_without_classifier_is_refused():
    x, _ = batch(8, 2, 8, 8)
    with pytest.raises(pw.BlockError, match="classifier"):
        relaxing(pw.Blocks(conv_blocks()[:2], x), optimizer=Recorded())
