"""Forward gradients are right on average, and as noisy as the law says; in float64."""

from collections.abc import Iterator

import pytest
import torch
from closeness import close
from estimates import CLASSES, components, exact, gradients
from torch import Tensor, nn

from plywise.local.component import Signal


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_mean_of_many_draws_is_the_gradient():
    x, y = torch.randn(2, 6), torch.tensor([0, 2])
    block, passes = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()), 40_000
    component = components([block, nn.Linear(3, CLASSES)], x, passes=passes)[0]
    expected = torch.cat([g.flatten() for g in exact(component, Signal(x, y))[:4]])
    found = torch.cat([g.flatten() for g in gradients(component, Signal(x, y))[:4]])
    assert close(found, expected, 3 * (8 / passes) ** 0.5)  # three standard deviations
    assert not close(found, expected, 1e-4)  # and an estimate it is


DRAWS = 4000
SIGNS = {"normal": torch.randn_like, "signs": lambda z: 2.0 * torch.randint_like(z, 2) - 1}


def draws_of_one_sample(
    layers: list[nn.Module], width: int, **options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """DRAWS estimates of one sample's gradient at the first layer's outputs, and all exact gradients.

    Sample i has its own input e_i and all columns of the weight are the same, so that the rows are draws of
    one sample, and column i of the weight's gradient holds what was estimated at row i.
    """
    first = nn.Linear(DRAWS, width, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.randn(width, 1).expand(width, DRAWS))
    signal = Signal(torch.eye(DRAWS), torch.zeros(DRAWS, dtype=torch.long))
    block = nn.Sequential(first, *layers)
    top = nn.Linear(block(signal.s[:1]).shape[1], CLASSES)
    component = components([block, top], signal.s, **options)[0]
    expected = exact(component, signal)
    return DRAWS * gradients(component, signal)[0].T, DRAWS * expected[0].T[0], expected


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("draw", SIGNS)
def test_variance_law_of_one_layer(draw, passes):
    """``E‖ĝ-g‖² / ‖g‖² = q + 1`` for normal u, ``q - 1`` for signs; ``passes`` directions divide it."""
    found, g, _ = draws_of_one_sample([nn.Tanh()], 8, passes=passes, draw=SIGNS[draw])
    ratio = (found - g).square().sum(1).mean() / g.square().sum()
    law = (9 if draw == "normal" else 7) / passes
    assert ratio.item() == pytest.approx(law, rel=0.1)
    assert close(found.mean(0), g, 3 * (law / DRAWS) ** 0.5)


def test_variance_law_of_two_layers():
    """A layer of q units receives the noise of both: ``E‖ĝ-g‖² = q ‖(g, g')‖² + ‖g‖²``."""
    found, g, gradients_ = draws_of_one_sample([nn.Tanh(), nn.Linear(6, 5), nn.Tanh()], 6)
    g_ = gradients_[2]  # of the second layer's bias, which is that of its outputs
    noise = (found - g).square().sum(1).mean()
    law = 6 * (g.square().sum() + g_.square().sum()) + g.square().sum()
    assert noise.item() == pytest.approx(law.item(), rel=0.1)
    assert law > 1.5 * 7 * g.square().sum()  # the second layer's share is seen
    assert close(found.mean(0), g, 3 * (law / DRAWS / g.square().sum()) ** 0.5)
