"""SCPL: the contrastive loss against its slow definition, and who follows what."""

import math

import pytest
import torch
from moves import Recorded, batch, conv_blocks, relative, tanh_blocks
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.local.scpl import contrastive_loss


def slow_loss(z, y, temperature):
    """Sample by sample, as the paper's code counts."""
    n = len(z)
    unit = [row / row.norm() for row in z]
    total = 0
    for i in range(n):
        among = [math.exp(float(unit[i] @ unit[j]) / temperature) for j in range(n)]
        others = sum(among) - among[i]
        mine = [j for j in range(n) if y[j] == y[i]]
        total -= sum(math.log(among[j] / others) for j in mine if j != i) / len(mine)
    return total / n


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_contrastive_loss(temperature):
    torch.manual_seed(0)
    z, y = torch.randn(11, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 3, 0])
    found = contrastive_loss(z, y, temperature)
    assert found.item() == pytest.approx(slow_loss(z, y, temperature), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: contrastive_loss(a, y, temperature), z.requires_grad_())


def test_its_limits():
    """A sample alone in its class counts as 0; so do two at one point, where the temperature is low."""
    alone = torch.randn(4, 3, dtype=torch.float64)
    assert contrastive_loss(alone, torch.arange(4)).item() == 0
    two = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    assert contrastive_loss(two, torch.tensor([0, 1, 0, 1]), 1e-3).item() == pytest.approx(0, abs=1e-12)
    z = torch.randn(6, 3, dtype=torch.float64)
    assert contrastive_loss(5 * z, torch.arange(6) % 2) == pytest.approx(
        contrastive_loss(z, torch.arange(6) % 2).item()
    )


def test_blocks_contrast_and_the_last_one_classifies():
    modules, (x, y), recorded = tanh_blocks(), batch(9, 5), Recorded()
    learner = pw.SCPL(pw.Blocks(modules, x), 3, temperature=0.3, optimizer=recorded)
    projections = [trainer.component.head for trainer in learner.trainers]
    assert projections[-1] is None
    s, wanted, losses, parts = x, [], [], []
    for block, projection in zip(modules, projections, strict=True):
        s = block(s.detach())
        losses.append(cross_entropy(s, y) if projection is None else contrastive_loss(projection(s), y, 0.3))
        parts += [block] if projection is None else [block, projection]
        learning = [*block.parameters(), *(() if projection is None else projection.parameters())]
        wanted += torch.autograd.grad(losses[-1], learning)
    torch.testing.assert_close(learner.step(x, y), torch.stack(losses).detach(), rtol=1e-12, atol=0)
    assert relative(recorded.of(parts), wanted) < 1e-12


def test_feature_maps_are_pooled_before_the_projection():
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    learner = pw.SCPL(pw.Blocks(modules, x), 3, optimizer=Recorded())
    assert torch.isfinite(learner.step(x, y)).all()
    assert learner.trainers[0].component.head[2].in_features == 4 * 2 * 2


def test_a_temperature_of_zero_is_refused():
    x, _ = batch(4, 5)
    with pytest.raises(ValueError, match="temperature"):
        pw.SCPL(pw.Blocks(tanh_blocks(), x), 3, temperature=0.0, optimizer=Recorded())
