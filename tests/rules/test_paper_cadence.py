"""The published cadence of AdaBK and feature whitening, step by step in float64."""

from itertools import pairwise

import pytest
import torch
from algebra import relative
from torch import Tensor, nn

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

RULES = {
    "AdaBK": (lambda **how: pw.AdaBK(**how), 0.9, 0.01, (200, 2000)),
    "FeatureWhitening": (lambda **how: pw.FeatureWhitening(rank=None, **how), 0.95, 1e-3, (50, 500)),
}
WIDTHS = (3, 9, 2)


def take_root(statistic: Tensor, damping: float) -> Tensor:
    values, vectors = torch.linalg.eigh(statistic)
    return vectors @ torch.diag((values + damping * values[-1]).rsqrt()) @ vectors.T


@pytest.mark.parametrize("name", RULES)
def test_all_layers_gather_and_refresh_in_the_papers_steps(name):
    """Roots are those of step 0 until the first refresh; c is of each step, also where rows are few."""
    make, decay, damping, (stats_every, refresh_every) = RULES[name]
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(WIDTHS)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = make(cadence="paper").attach(model, optimizer)
    statistics: list[dict[str, Tensor]] = [{}, {}]
    counts = [0.0, 0.0]
    roots: list[dict[str, Tensor]] = [{}, {}]
    last = refresh_every + stats_every
    watched = {0, 1, stats_every, refresh_every - 1, refresh_every, refresh_every + 1, last}
    for step in range(last + 1):
        gathers, refreshes = step % stats_every == 0, step % refresh_every == 0
        if not gathers and step not in watched:
            optimizer.zero_grad()
            model(torch.ones(1, WIDTHS[0])).sum().backward()
            optimizer.step()
            continue
        x = torch.randn(4, WIDTHS[0]) * (1 + step / stats_every)
        optimizer.zero_grad()
        out = model(x)
        delta = torch.randn_like(out)
        (out * delta).sum().backward()
        optimizer.step()
        rows = [(x, delta @ layers[1].weight.detach()), (layers[0](x).detach(), delta)]
        for place, (A, D) in enumerate(rows):
            if gathers:
                for side, value in (("R", A.T @ A), ("L", D.T @ D)):
                    statistics[place][side] = decay * statistics[place].get(side, 0) + value
                counts[place] = decay * counts[place] + 1
            if refreshes:
                R, L = (statistics[place][side] / counts[place] for side in "RL")
                roots[place] = {"R": take_root(R / len(x), damping), "L": take_root(L, damping)}
            if step in watched:
                G = D.T @ A
                move = G @ roots[place]["R"]
                move = roots[place]["L"] @ move if name == "AdaBK" else move
                move = move * G.norm() / move.norm()
                assert relative(layers[place].weight.grad, move) < 1e-8, (step, place)
    rule.detach()


@pytest.mark.parametrize("name", RULES)
def test_one_argument_sets_it(name):
    make, *_, (stats_every, refresh_every) = RULES[name]
    rule = make(cadence="paper")
    assert (rule.stats_every, rule.refresh_every) == (stats_every, refresh_every)
    assert make(cadence="paper", stats_every=stats_every).refresh_every == refresh_every
    with pytest.raises(ValueError, match="leave it out"):
        make(cadence="paper", refresh_every=20)
    with pytest.raises(ValueError, match="cadence"):
        make(cadence="mine")
