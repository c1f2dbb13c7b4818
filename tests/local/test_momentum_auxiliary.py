"""Momentum auxiliary networks: gradients by definition, and how the slow copies move."""

import copy

import pytest
import torch
from moves import Recorded, batch, conv_blocks, relative, same_bits, tanh_blocks
from torch import nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.local.momentum_auxiliary import beginning


def learner_of(modules, x, recorded=None, **settings):
    return pw.MomentumAuxiliary(pw.Blocks(modules, x), 3, optimizer=recorded or Recorded(), **settings)


def test_each_block_is_judged_by_a_slow_and_a_learning_copy_of_what_follows():
    modules, (x, y), recorded = tanh_blocks(), batch(9, 5), Recorded()
    learner = learner_of(modules, x, recorded, momentum=0.9)
    learner.step(x, y)  # then the slow copies are no longer what comes next
    heads = [trainer.component.head for trainer in learner.trainers[:-1]]
    s, wanted, losses = x, [], []
    for number, block in enumerate(modules):
        s = block(s.detach())
        head = heads[number] if number < 3 else None
        scores = s if head is None else head.head(head.slow(s) + head.learned(s))
        losses.append(cross_entropy(scores, y))
        learning = () if head is None else (*head.learned.parameters(), *head.head.parameters())
        wanted += torch.autograd.grad(losses[-1], [*block.parameters(), *learning])
    torch.testing.assert_close(learner.step(x, y), torch.stack(losses).detach(), rtol=1e-12, atol=0)
    found = []
    for number, block in enumerate(modules):
        found += recorded.of([block, *([heads[number].learned, heads[number].head] if number < 3 else [])])
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_slow_copies_follow_the_next_blocks(momentum):
    modules, (x, y) = tanh_blocks(), batch(9, 5)
    learner = learner_of(modules, x, momentum=momentum)
    slow = [copy.deepcopy(block.state_dict()) for block in modules[1:]]
    for _ in range(3):
        learner.step(x, y)
        for number, block in enumerate(modules[1:]):
            for key, now in block.state_dict().items():
                slow[number][key] = momentum * slow[number][key] + (1 - momentum) * now
    for number in range(3):
        found = learner.trainers[number].component.head.slow.state_dict()
        for key, value in found.items():
            torch.testing.assert_close(value, slow[number][key], rtol=1e-12, atol=1e-15)


def test_one_block_has_no_auxiliary_network():
    network, (x, y), found = [nn.Sequential(*tanh_blocks())], batch(9, 5), []
    for kind in (pw.LocalLoss, pw.MomentumAuxiliary):
        recorded, modules = Recorded(), copy.deepcopy(network)
        kind(pw.Blocks(modules, x), 3, optimizer=recorded).step(x, y)
        found.append(recorded.of(modules))
    assert same_bits(*found)


def test_the_beginning_of_a_block():
    relu, conv, other = nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    assert list(beginning(nn.Sequential(relu, conv, nn.ReLU(), other)))[:2] == [relu, conv]
    assert len(beginning(nn.Sequential(relu, conv, nn.ReLU(), other))) == 3
    inner = beginning(nn.Sequential(nn.Sequential(conv, nn.ReLU(), other), other))
    assert next(iter(inner.modules())) is inner
    assert sum(isinstance(module, nn.Conv2d) for module in inner.modules()) == 1
    assert beginning(conv) is conv


def test_images_with_batch_norm_and_dropout_train():
    torch.manual_seed(0)
    modules, (x, y) = conv_blocks(), batch(32, 2, 8, 8)
    modules[1] = nn.Sequential(nn.ReLU(), *modules[1][1:])
    modules[4] = nn.Sequential(nn.ReLU(), *modules[4][1:])
    learner = learner_of([modules[0], nn.Sequential(*modules[1:3]), *modules[3:]], x, momentum=0.9)
    losses = [learner.step(x, y) for _ in range(60)]
    assert (losses[-1] < losses[0]).all()


def test_what_it_refuses():
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    with pytest.raises(pw.BlockError, match="in place"):
        learner_of(modules, x).step(x, y)
    with pytest.raises(ValueError, match="momentum"):
        learner_of(tanh_blocks(), torch.randn(4, 5, dtype=torch.float64), momentum=1.5)
