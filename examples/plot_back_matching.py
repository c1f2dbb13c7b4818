"""
Back-matching: layers of badly different scale
==============================================

This example rescales the layers of a ReLU network, and compares SGD with ``plywise.BackMatching`` on both
versions. If one layer's weights are multiplied by 10 and the next layer's are divided by 10, the network
computes the same function, but SGD trains it worse: no single rate fits all layers. ``BackMatching`` measures
a rate for each layer, and trains both networks equally well. After `Zhang et al.
<https://arxiv.org/abs/1802.09750>`_ (2018); the scalars are ours.
"""

from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, FACTORS = 200, {"as initialised": (1, 1, 1, 1), "rescaled": (10, 0.1, 10, 0.1)}
train, _, _ = load_digits()


def make_network(factors):
    torch.manual_seed(0)
    widths = (64, 48, 48, 48, 10)
    layers = [nn.Linear(m, n, bias=False) for m, n in pairwise(widths)]
    for layer, factor in zip(layers, factors, strict=True):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layer.weight.data *= factor
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def train_network(factors, rate, rule=None):
    model, losses = make_network(factors), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    if rule is not None:
        rule.attach(model, optimizer)
    for rows in torch.randint(len(train.x), (STEPS, 64)):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]))
        losses[-1].backward()
        optimizer.step()
    return [loss.item() for loss in losses]


# %%
# SGD uses the best of five rates on each network. Back-matching uses one rate for both.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
for axis, (name, factors) in zip(axes, FACTORS.items(), strict=True):
    runs = {f"SGD, rate {rate:g}": train_network(factors, rate) for rate in (3e-4, 1e-3, 1e-2, 3e-2, 0.1)}
    best = min(runs, key=lambda run: sum(runs[run][-20:]))
    matched = {"BackMatching, rate 0.1": train_network(factors, 0.1, pw.BackMatching())}
    for label, losses in ({best: runs[best]} | matched).items():
        print(f"{name:14} {label:24} {sum(losses[-20:]) / 20:.3f}")
        axis.plot(losses, label=label)
    axis.set(title=name, xlabel="steps", ylabel="loss of a batch", ylim=(0, 3))
    axis.legend()
plt.show()
