"""
Making a network shallower by fusing its last layers
====================================================

A network of four layers is trained on digits. Then its last two layers become one, the linear layer that
answers most like the pair on the training data, and the shallower network trains on; and once more. The
picture shows each shallower network beside one of the same shape that starts from random weights. The fused
one begins where the deeper one ended, and is still ahead after eight epochs; it has had those of the deeper
ones before, which the random start has not.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.init import fuse_slice

train, _, test = load_digits()
EPOCHS, SEEDS = 8, 5


# %%
# One epoch of Adam, then the accuracy on the test images; the first figure is that before any training.


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(test.x).argmax(1) == test.y).double().mean().item()


def trained(model: nn.Module) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    curve = [accuracy(model)]
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train.y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
        curve.append(accuracy(model))
    return curve


def network(depth: int) -> nn.Sequential:
    hidden = [part for _ in range(depth - 2) for part in (nn.Linear(48, 48), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), *hidden, nn.Linear(48, 10))


# %%
# The loop of the paper. The last pair is Linear, ReLU, Linear: the last three modules.

curves: dict[str, list[list[float]]] = {}
for seed in range(SEEDS):
    torch.manual_seed(seed)
    model = network(4)
    curves.setdefault("4 layers", []).append(trained(model))
    for depth in (3, 2):
        model = fuse_slice(model, len(model) - 3, len(model), train.x)
        curves.setdefault(f"{depth} layers, fused", []).append(trained(model))
        curves.setdefault(f"{depth} layers, random", []).append(trained(network(depth)))

medians = {name: torch.tensor(runs).median(0).values for name, runs in curves.items()}
for name, curve in medians.items():
    print(f"{name:17} at first {curve[0]:.3f}, after 1 epoch {curve[1]:.3f}, after {EPOCHS} {curve[-1]:.3f}")

# %%
# Medians over five seeds.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axis, depth in zip(axes, (3, 2), strict=True):
    axis.plot(medians[f"{depth} layers, fused"], "o-", label="fused from the deeper one")
    axis.plot(medians[f"{depth} layers, random"], "s--", label="random start")
    axis.axhline(medians["4 layers"][-1], color="gray", lw=1, label="the four layers, trained")
    axis.set(title=f"{depth} layers", xlabel="epochs of training", ylim=(0.5, 1.0))
axes[0].set_ylabel("accuracy on test digits")
axes[1].legend(loc="lower right")
plt.show()
