"""Interlocking backpropagation against its definition by plain autograd, from local to end to end."""

import copy
import gc
import weakref

import pytest
import torch
from moves import (
    Recorded,
    backprop,
    batch,
    conv_blocks,
    counting_forwards,
    moves,
    relative,
    same_bits,
    tanh_blocks,
)
from torch import nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.local.heads import pooled_linear


def interlocking(blocks, horizon, **settings):
    return pw.Interlocking(blocks, 3, horizon=horizon, **settings)


def definition(modules, heads, horizon, x, y):
    """Gradients of every block and every head, one connected graph and one ``grad`` for each of them."""
    outputs = [x]
    for block in modules:
        outputs.append(block(outputs[-1]))
    judges = [*heads, nn.Identity()]
    losses = [cross_entropy(judge(s), y) for judge, s in zip(judges, outputs[1:], strict=True)]
    gradients = {}
    for i, block in enumerate(modules):
        followed = losses[min(i + horizon - 1, len(modules) - 1)]
        of_block = torch.autograd.grad(followed, list(block.parameters()), retain_graph=True)
        gradients |= dict(zip(block.parameters(), of_block, strict=True))
    for head, s in zip(heads, outputs[1:], strict=False):
        of_head = torch.autograd.grad(cross_entropy(head(s.detach()), y), list(head.parameters()))
        gradients |= dict(zip(head.parameters(), of_head, strict=True))
    return gradients, torch.stack(losses).detach()


@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 9])
def test_definition(horizon):
    """K = 4; a horizon beyond K is one of K."""
    modules, heads, (x, y), recorded = tanh_blocks(), [], batch(9, 5), Recorded()

    def make_head(shape, classes):
        heads.append(pooled_linear(shape, classes).double())
        return heads[-1]

    learner = interlocking(pw.Blocks(modules, x), horizon, head=make_head, optimizer=recorded)
    wanted, losses = definition(modules, heads, horizon, x, y)
    assert torch.equal(learner.step(x, y), losses)
    assert recorded.gradients.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert relative([recorded.gradients[parameter]], [gradient]) < 1e-13


@pytest.mark.parametrize("horizon", [4, 5])
def test_the_farthest_horizon_is_backpropagation(horizon):
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    wanted = backprop(modules, cross_entropy, x, y)
    assert same_bits(moves(interlocking, modules, x, y, horizon=horizon), wanted)


def test_backpropagation_of_convolutions():
    """Batch norm, blocks that begin in place, one without parameters, channels last; no dropout."""
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    for module in nn.ModuleList(modules).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = x.contiguous(memory_format=torch.channels_last)
    wanted = backprop(copy.deepcopy(modules), cross_entropy, x, y)
    assert relative(moves(interlocking, modules, x, y, horizon=5), wanted) < 1e-12


@pytest.mark.parametrize("make_modules", [tanh_blocks, conv_blocks])
def test_horizon_one_is_local_loss(make_modules):
    """The same bits, dropout's masks among them, over some steps."""
    modules = make_modules()
    x, y = batch(9, 5) if make_modules is tanh_blocks else batch(8, 2, 8, 8)
    found = []
    for make in (pw.LocalLoss, pw.Interlocking):
        torch.manual_seed(1)  # of the heads
        blocks = pw.Blocks(copy.deepcopy(modules), x)
        learner = make(blocks, 3, optimizer=Recorded(), **({"horizon": 1} if make is pw.Interlocking else {}))
        losses = [learner.step(x, y) for _ in range(3)]
        states = [trainer.component.state_dict() for trainer in learner.trainers]
        found.append([*losses, *(value for state in states for value in state.values())])
    assert same_bits(*found)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_a_block_hears_no_farther_than_the_horizon(horizon):
    """Other weights in the blocks from i + n on change no bit of block i's gradient, one before does."""
    modules, (x, y) = tanh_blocks((5, 7, 6, 8, 6, 3)), batch(9, 5)

    def found(changed=None):
        copies = copy.deepcopy(modules)
        for block in copies[changed:] if changed is not None else []:
            for p in block.parameters():
                p.data.mul_(1.5)
        torch.manual_seed(1)
        gradients = moves(interlocking, copies, x, y, horizon=horizon)
        return [gradients[2 * i : 2 * i + 2] for i in range(5)]

    plain = found()
    for changed in range(1, 5):
        for i, (gradients, before) in enumerate(zip(found(changed), plain, strict=True)):
            assert same_bits(gradients, before) == (changed >= i + horizon)


def test_one_block_is_backpropagation():
    network, (x, y) = nn.Sequential(*tanh_blocks()), batch(9, 5)
    wanted = backprop([network], cross_entropy, x, y)
    assert same_bits(moves(interlocking, [network], x, y, horizon=1), wanted)


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_the_rule_backprop_changes_no_bit(horizon):
    modules, (x, y), found = tanh_blocks(), batch(9, 5), []
    for rule in (None, pw.Backprop):
        torch.manual_seed(1)
        found.append(moves(interlocking, copy.deepcopy(modules), x, y, horizon=horizon, rule=rule))
    assert same_bits(*found)


def test_proxprop_end_to_end():
    """Blocks receive ΔW from above under ProxProp, so that K-wise is ProxProp on the whole network."""
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    whole = nn.Sequential(*copy.deepcopy(modules))
    rule = pw.ProxProp(tau=1.0).attach(whole)
    cross_entropy(whole(x), y).backward()
    rule.detach()
    found = moves(interlocking, modules, x, y, horizon=4, rule=lambda: pw.ProxProp(tau=1.0))
    assert relative(found, [p.grad for p in whole.parameters()]) < 1e-12
    plain = backprop(copy.deepcopy(modules), cross_entropy, x, y)
    assert relative(found, plain) > 0.01


def test_what_only_passes_through_a_block_teaches_its_rule_nothing():
    """With n = 3 blocks 2 to 4 follow the last loss; the third, on its way to block 1, is not for K-FAC."""
    modules, (x, y), settings = tanh_blocks(), batch(32, 5), {"stats_every": 1, "refresh_every": 1}
    above = copy.deepcopy(modules[1:])
    s = modules[0](x).detach()
    found = []
    for blocks, inputs, horizon in ((modules, x, 3), ([nn.Sequential(*above)], s, 1)):
        recorded = Recorded(rate=0.0)
        learner = interlocking(
            pw.Blocks(blocks, inputs), horizon, optimizer=recorded, rule=lambda: pw.KFAC(**settings)
        )
        for _ in range(3):
            learner.step(inputs, y)
        found.append(recorded.of(blocks))
    assert relative(found[0][2:], found[1]) < 1e-10


def test_frozen_blocks_let_gradients_through():
    """A frozen block between and a frozen first block: the others' gradients are as before."""
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    torch.manual_seed(1)
    plain = moves(interlocking, copy.deepcopy(modules), x, y, horizon=3)
    for frozen in (0, 1):
        copies = copy.deepcopy(modules)
        copies[frozen].requires_grad_(False)
        torch.manual_seed(1)
        found = moves(interlocking, copies, x, y, horizon=3)
        assert found[2 * frozen : 2 * frozen + 2] == [None, None]
        del found[2 * frozen : 2 * frozen + 2]
        rest = [g for i, g in enumerate(plain) if i // 2 != frozen]
        assert same_bits(found, rest)


def test_a_block_that_lets_no_gradient_through():
    """Blocks below it stand still, as under backpropagation."""

    class Wall(nn.Module):
        def forward(self, x):
            return x.detach()

    modules, (x, y) = tanh_blocks(), batch(9, 5)
    modules.insert(2, Wall())
    wanted = backprop(modules[3:], cross_entropy, nn.Sequential(*modules[:3])(x), y)
    found = moves(interlocking, modules, x, y, horizon=5)
    assert not any(gradient.any() for gradient in found[:4])
    assert same_bits(found[4:], wanted)


def test_activations_of_n_blocks_at_a_time():
    """Most bytes that autograd keeps at once grow with the horizon, not with the number of blocks."""

    def peak(depth, horizon):
        modules, (x, y) = tanh_blocks([16] * depth + [3]), batch(256, 16)
        learner = interlocking(pw.Blocks(modules, x), horizon, optimizer=Recorded())
        kept, most = weakref.WeakSet(), 0

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor

        def pack(tensor):
            nonlocal most
            held = Kept(tensor)
            kept.add(held)
            storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.numel() for k in kept}
            most = max(most, sum(storages.values()))
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            learner.step(x, y)
        gc.collect()
        assert not kept  # nothing is held from step to step
        return most

    assert peak(16, 1) == peak(8, 1)
    assert peak(16, 2) == peak(8, 2)
    assert peak(16, 1) < peak(16, 2) < peak(16, 4) < peak(16, 16) / 2


def test_blocks_run_once_whatever_the_horizon():
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    learner = interlocking(pw.Blocks(modules, x), 4, optimizer=Recorded())
    with counting_forwards(modules) as counts:
        learner.step(x, y)
    assert set(counts.values()) == {1}


def test_random_numbers_drawn_in_backward():
    """The caller's stream stays; the same seed makes the same step."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + torch.randn_like(gradient)

    class NoisyBlock(nn.Module):
        def forward(self, x):
            return Noisy.apply(x)

    modules, (x, y), found = tanh_blocks(), batch(9, 5), []
    modules = [nn.Sequential(block, NoisyBlock()) for block in modules]
    for _ in range(2):
        torch.manual_seed(1)
        copies = copy.deepcopy(modules)
        learner = interlocking(pw.Blocks(copies, x), 2, optimizer=Recorded())
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        learner.step(x, y)
        assert torch.equal(torch.get_rng_state(), state)
        found.append([p for block in copies for p in block.parameters()])
    assert same_bits(*found)


@pytest.mark.parametrize("horizon", [0, -1, 1.5, True])
def test_a_horizon_is_a_whole_number(horizon):
    x, _ = batch(9, 5)
    with pytest.raises(ValueError, match="horizon"):
        interlocking(pw.Blocks(tanh_blocks(), x), horizon, optimizer=Recorded())
