"""
Consequentialism: correcting the effect of samples on each other
================================================================

This example compares the change of a linear layer's outputs that the gradient asks for with the change that
one step makes, with and without ``plywise.Consequentialism`` (CWU). A gradient step for one sample also
changes the outputs of all other samples in the batch. The rule corrects each sample's output gradient for
this effect before the step.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

train, _, _ = load_digits()
x, y = train.x[:48], train.y[:48]


def measure_changes(rule=None):
    """Return the change of each output that the gradient asks for, and the one that SGD makes in a step."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    if rule is not None:
        rule.attach(layer, optimizer)
    before = layer(x)
    before.retain_grad()
    nn.functional.cross_entropy(before, y, reduction="sum").backward()
    optimizer.step()
    with torch.no_grad():
        return -before.grad, layer(x) - before


# %%
# The closer the points are to a line, the closer each sample's change is to the one its gradient asks for.

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, rule in zip(axes, (None, pw.Consequentialism()), strict=True):
    wanted, actual = (part.flatten() for part in measure_changes(rule))
    correlation = torch.corrcoef(torch.stack([wanted, actual]))[0, 1].item()
    name = "SGD" if rule is None else "Consequentialism on SGD"
    print(f"{name:24} correlation {correlation:.3f}")
    axis.plot(wanted, actual, ".", alpha=0.5)
    axis.set(
        title=f"{name}: correlation {correlation:.2f}",
        xlabel="wanted change of an output",
        ylabel="actual change",
    )
plt.show()
