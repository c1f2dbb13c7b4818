"""
Making a network shallower by fusing its last layers
====================================================

This example trains a network of four layers, then repeatedly replaces its last two layers by one and trains
on. The new linear layer approximates the outputs of the pair on the training data. The plots compare each
fused network with one of the same shape that starts from random weights. The fused network starts near the
accuracy of the deeper one, and is still ahead after eight epochs; but it also profits from the epochs of the
deeper networks, which the randomly initialised one does not have.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.init import fuse_slice

train, _, test = load_digits()
EPOCHS, SEEDS = 8, 5


# %%
# The accuracy on the test images is measured before training and after each epoch of Adam.


def measure_accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(test.x).argmax(1) == test.y).double().mean().item()


def train_epochs(model: nn.Module) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    curve = [measure_accuracy(model)]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train.y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
        curve.append(measure_accuracy(model))
    return curve


def make_network(depth: int) -> nn.Sequential:
    hidden = [part for _ in range(depth - 2) for part in (nn.Linear(48, 48), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), *hidden, nn.Linear(48, 10))


# %%
# The loop follows the paper. The last pair of layers is Linear, ReLU, Linear: the last three modules.

curves: dict[str, list[list[float]]] = {}
for seed in range(SEEDS):
    torch.manual_seed(seed)
    model = make_network(4)
    curves.setdefault("4 layers", []).append(train_epochs(model))
    for depth in (3, 2):
        model = fuse_slice(model, len(model) - 3, len(model), train.x)
        curves.setdefault(f"{depth} layers, fused", []).append(train_epochs(model))
        curves.setdefault(f"{depth} layers, random", []).append(train_epochs(make_network(depth)))

medians = {name: torch.tensor(runs).median(0).values for name, runs in curves.items()}
for name, curve in medians.items():
    before, first, last = curve[0], curve[1], curve[-1]
    print(f"{name:17} before training {before:.3f}, after 1 epoch {first:.3f}, after {EPOCHS} {last:.3f}")

# %%
# The medians over five seeds.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axis, depth in zip(axes, (3, 2), strict=True):
    axis.plot(medians[f"{depth} layers, fused"], "o-", label="fused from the deeper network")
    axis.plot(medians[f"{depth} layers, random"], "s--", label="random start")
    axis.axhline(medians["4 layers"][-1], color="gray", lw=1, label="the trained network of four layers")
    axis.set(title=f"{depth} layers", xlabel="epochs of training", ylim=(0.5, 1.0))
axes[0].set_ylabel("accuracy on test digits")
axes[1].legend(loc="lower right")
plt.show()
