"""Gradient amplification: which layers, by how much, when."""

import pytest
import torch
from torch import nn

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


def ratios(rule, steps, layers=4, optimizer=torch.optim.SGD, lr=0.0):
    """For each step, each layer's gradient relative to that of plain training (lr 0: weights stay)."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]), torch.randn(8, 4)
    plain = torch.autograd.grad(model(x).square().sum(), [layer.weight for layer in model])
    optimizer = optimizer(model.parameters(), lr=lr)
    rule.attach(model, optimizer)
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        rows.append(
            [float(layer.weight.grad.norm() / g.norm()) for layer, g in zip(model, plain, strict=True)]
        )
        optimizer.step()
    rule.detach()
    return rows


def test_modes():
    """In mode "signal" factors compound upstream; in mode "gradient" each layer has its own."""
    make = {"factor": 3.0, "share": 1.0, "every": 5}
    signal = ratios(pw.GradientAmplification(mode="signal", **make), 3)
    assert signal[0] == pytest.approx([1, 1, 1, 1])  # nothing is chosen before the first step
    assert signal[1] == signal[2] == pytest.approx([81, 27, 9, 3])
    assert ratios(pw.GradientAmplification(mode="gradient", **make), 2)[1] == pytest.approx([3, 3, 3, 3])


def test_a_choice_lasts_a_period_and_changes():
    rows = ratios(pw.GradientAmplification(mode="gradient", every=4), 41, layers=12)
    periods = [rows[1 + 4 * i : 5 + 4 * i] for i in range(10)]
    assert all(row == pytest.approx(period[0]) for period in periods for row in period)
    chosen = [tuple(round(ratio) for ratio in period[0]) for period in periods]
    assert len(set(chosen)) > 5
    share = sum(ratio == 2 for row in chosen for ratio in row) / 120
    assert 0.35 < share < 0.65
    again = ratios(pw.GradientAmplification(mode="gradient", every=4), 41, layers=12)
    assert again == rows
    other = ratios(pw.GradientAmplification(mode="gradient", every=4, seed=1), 41, layers=12)
    assert other != rows


def test_until():
    rule = pw.GradientAmplification(share=1.0, mode="gradient", every=3, until=6)
    rows = ratios(rule, 12)
    assert [round(row[0]) for row in rows] == [1, *[2] * 6, *[1] * 5]


@pytest.mark.parametrize(("rest", "wanted"), [(1, [2, 2, 1, 1, 2, 2, 1, 1]), (2, [2, 2, 1, 1, 1, 1, 2, 2])])
def test_periods_alternate(rest, wanted):
    """After a period with amplification come so many without; `until` ends both."""
    rule = pw.GradientAmplification(share=1.0, mode="gradient", every=2, rest=rest)
    assert [round(row[0]) for row in ratios(rule, 9)] == [1, *wanted]
    ended = pw.GradientAmplification(share=1.0, mode="gradient", every=2, rest=rest, until=4)
    assert [round(row[0]) for row in ratios(ended, 9)] == [1, 2, 2, *[1] * 6]


def test_agreement_chooses_layers_whose_gradients_agree():
    """A layer fed the same batch agrees with itself; one whose gradient changes sign does not."""
    torch.manual_seed(0)
    steady, torn = nn.Linear(3, 2), nn.Linear(3, 2)
    model = nn.ModuleDict({"steady": steady, "torn": torn})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = pw.GradientAmplification(factor=5.0, mode="gradient", agreement=0.5, every=4).attach(
        model, optimizer
    )
    x = torch.randn(6, 3)
    sizes = []
    for step in range(6):
        optimizer.zero_grad()
        (steady(x).sum() + (-1) ** step * torn(x).sum()).backward()
        sizes.append([float(layer.weight.grad.norm()) for layer in (steady, torn)])
        optimizer.step()
    rule.detach()
    assert sizes[5][0] == pytest.approx(5 * sizes[0][0])
    assert sizes[5][1] == pytest.approx(sizes[0][1])


def test_adam_divides_the_factor_out():
    """The documented warning: in mode "gradient" with Adam only the change of factors is felt."""
    moves = []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 2), torch.randn(5, 4)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=(0.0, 0.0), eps=1e-30)
        rule = pw.GradientAmplification(factor=factor, share=1.0, mode="gradient").attach(layer, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        rule.detach()
        moves.append(layer.weight.detach().clone())
    torch.testing.assert_close(*moves)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"factor": 0.0}, "factor"),
        ({"share": 1.5}, "share"),
        ({"share": 0.0}, "share"),
        ({"mode": "both"}, "mode"),
        ({"agreement": -1.0}, "agreement"),
        ({"every": 0}, "every"),
        ({"rest": -1}, "rest"),
        ({"rest": 0.5}, "rest"),
        ({"until": 1.5}, "until"),
    ],
)
def test_refusals(settings, name):
    with pytest.raises(ValueError, match=f"GradientAmplification: {name}"):
        pw.GradientAmplification(**settings)
