"""
Consequentialism: what all samples do to each other
===================================================

A gradient step for one sample changes the outputs of all the others. ``plywise.Consequentialism`` (CWU)
corrects each sample's error for this before the step. Here is what it does to one linear layer: the wanted
change of the outputs against the change that one step makes.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

train, _, _ = load_digits()
x, y = train.x[:48], train.y[:48]


def changes(rule=None):
    """The change of each output that the gradient asks for, and the one that a step of SGD makes."""
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
# The nearer the points are to a line, the more each sample gets what it asked for.

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, rule in zip(axes, (None, pw.Consequentialism()), strict=True):
    wanted, made = (part.flatten() for part in changes(rule))
    fit = torch.corrcoef(torch.stack([wanted, made]))[0, 1].item()
    name = "SGD" if rule is None else "Consequentialism on SGD"
    print(f"{name:24} correlation {fit:.3f}")
    axis.plot(wanted, made, ".", alpha=0.5)
    axis.set(
        title=f"{name}: correlation {fit:.2f}", xlabel="wanted change of an output", ylabel="change made"
    )
plt.show()
