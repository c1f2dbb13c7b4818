"""Rules compose with these optimizers as with torch's own."""

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.optim import KLSOAP, LRSGDC, LRSGDR, SOAP, ASkewSGD, Muon, NorMuon, SalpSGD, YamAdam

OPTIMIZERS = {
    "LRSGDR": LRSGDR,
    "LRSGDC": LRSGDC,
    "YamAdam": YamAdam,
    "Muon": lambda params: Muon(params, lr=0.02),
    "NorMuon": lambda params: NorMuon(params, lr=0.02),
    "SOAP": SOAP,
    "KLSOAP": KLSOAP,
    "SalpSGD": lambda params: SalpSGD(params, total_steps=20),
    "ASkewSGD": lambda params: ASkewSGD(params, steps_per_epoch=10),
}


def weights_after(make, rule, steps=20):
    """A network's weights after some steps, and its first and last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    optimizer = make(model.parameters())
    if rule is not None:
        rule.attach(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(steps):
        if isinstance(optimizer, SalpSGD):
            losses.append(optimizer.step(closure))
        else:
            losses.append(closure())
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()], losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_identity_rule_changes_nothing(name):
    plain, one = weights_after(OPTIMIZERS[name], None)
    ruled, two = weights_after(OPTIMIZERS[name], pw.Backprop())
    assert one == two
    assert all(map(torch.equal, plain, ruled))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [pw.ProxProp, pw.Foof])
def test_a_rule_makes_another_move_and_the_loss_falls(name, rule):
    _, plain = weights_after(OPTIMIZERS[name], None)
    _, ruled = weights_after(OPTIMIZERS[name], rule())
    assert plain != ruled
    assert min(ruled) < ruled[0]
