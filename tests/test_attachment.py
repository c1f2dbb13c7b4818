"""What an attachment notices and does once, whatever the rule."""

import pytest
import torch
from torch import nn

import plywise as pw


def test_a_hook_before_ours_is_noticed():
    # it may change the output, and the rule would solve for another function than the layer's
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    rule = pw.ProxProp().attach(model)
    model[0].register_forward_hook(lambda module, args, output: output * 2, prepend=True)
    with pytest.raises(pw.UncapturedLayerError, match=r"'0'.*hook added since.*exclude='0'"):
        model(torch.randn(4, 3)).sum().backward()
    rule.detach()


def test_a_shared_weight_and_both_biases_shrink_once_by_the_same_factor():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = 100 * torch.randn(5, 3)
    moves = []
    for cap in (None, 0.5):
        optimizer.zero_grad()
        rule = pw.BackMatching(cap=cap).attach(model, optimizer)
        (1e3 * model(x).square().mean()).backward()
        optimizer.step()
        moves.append([p.grad.clone() for p in (first.weight, first.bias, second.bias)])
        rule.detach()
    free, capped = moves
    factor = 0.5 * first.weight.norm() / free[0].norm()
    assert factor < 1
    for whole, part in zip(free, capped, strict=True):
        torch.testing.assert_close(part, factor * whole)


def test_the_error_names_what_is_not_finite():
    model = nn.Linear(3, 2)
    rule = pw.ProxProp().attach(model)
    with pytest.raises(pw.NonFiniteError, match="the input is not finite"):
        model(torch.full((4, 3), float("nan"))).sum().backward()
    with pytest.raises(pw.NonFiniteError, match="the gradient at its output is not finite"):
        (model(torch.randn(4, 3)).sum() * float("inf")).backward()
    rule.detach()
