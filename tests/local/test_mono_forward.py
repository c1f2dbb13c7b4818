"""Mono-Forward: each block and its projection by themselves, and who votes."""

import pytest
import torch
from moves import Recorded, batch, conv_blocks, relative, tanh_blocks
from torch.nn.functional import cross_entropy

import plywise as pw


def learner_of(modules, x, recorded=None, **settings):
    return pw.MonoForward(pw.Blocks(modules, x), 3, optimizer=recorded or Recorded(), **settings)


def projections(learner):
    return [trainer.component.head for trainer in learner.trainers]


def test_each_block_and_its_projection_follow_the_cross_entropy_of_the_goodness():
    """G = a Mᵀ, written out."""
    modules, (x, y), recorded = tanh_blocks((5, 7, 6, 4)), batch(9, 5), Recorded()
    learner = learner_of(modules, x, recorded)
    a, wanted, losses = x, [], []
    for block, head in zip(modules, projections(learner), strict=True):
        (M,) = head.parameters()
        assert M.shape == (3, block[0].out_features if isinstance(block, torch.nn.Sequential) else 4)
        a = block(a.detach())
        losses.append(cross_entropy(a @ M.T, y))
        wanted += torch.autograd.grad(losses[-1], [*block.parameters(), M])
    torch.testing.assert_close(learner.step(x, y), torch.stack(losses).detach(), rtol=1e-12, atol=0)
    pairs = [module for pair in zip(modules, projections(learner), strict=True) for module in pair]
    assert relative(recorded.of(pairs), wanted) < 1e-12


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_votes_add_up_or_the_last_one_decides(depth):
    modules, (x, y) = tanh_blocks((5, 7, 6, 4)), batch(9, 5)
    for votes in ("all", "last"):
        learner = learner_of(modules, x, votes=votes)
        learner.step(x, y)
        opinions, a = [], x
        for block, head in list(zip(modules, projections(learner), strict=True))[:depth]:
            a = block(a)
            opinions.append(head(a))
        wanted = sum(opinions) if votes == "all" else opinions[-1]
        torch.testing.assert_close(learner.as_module(depth)(x), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="one of 'all', 'last', not 'some'"):
        learner_of(modules, x, votes="some")


def test_feature_maps_are_projected_whole():
    modules, (x, y) = conv_blocks()[:3], batch(8, 2, 8, 8)
    learner = learner_of(modules, x)
    learner.step(x, y)
    assert [head[1].weight.shape[1] for head in projections(learner)] == [256, 54, 6]
    assert learner.predict(x).shape == (8, 3)
