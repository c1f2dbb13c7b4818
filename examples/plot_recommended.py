"""
The recommended method: Muon and AdamW in better coordinates
============================================================

This example compares the optimizer of ``plywise.recommend(model)`` with AdamW on an autoencoder of digits,
each at the best of three learning rates. The recommended optimizer uses Muon for hidden weights and AdamW for
all others. Where this is worth the time, they work in the eigenbasis of the layer's inputs
(``plywise.Coordinates``): in layers with many rows per batch, and often in the output layer. In this small
network only the output layer is chosen. A third method uses coordinates in all layers, which a larger
``budget`` allows. The result is used like any other optimizer.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, RATES = 250, (3e-3, 1e-2, 3e-2)
train, validation, _ = load_digits()


def make_model():
    torch.manual_seed(0)
    widths = (64, 96, 48, 12, 48, 96, 64)
    layers = [part for m, n in pairwise(widths) for part in (nn.Linear(m, n), nn.ELU())]
    return nn.Sequential(*layers[:-1])


def train_autoencoder(make, rate):
    model, losses = make_model(), []
    optimizer = make(model, rate)
    for step, rows in enumerate(torch.randint(len(train.x), (STEPS, 128))):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(train.x[rows]), train.x[rows]).backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                losses.append(nn.functional.mse_loss(model(validation.x), validation.x).item())
    return losses


# %%
# The first output shows what was chosen and what it costs. In the plot, dotted lines are the other rates.
METHODS = {
    "AdamW": lambda model, rate: torch.optim.AdamW(model.parameters(), rate),
    "recommended": lambda model, rate: pw.recommend(model, rate, batch_size=128).optimizer,
    "recommended, all layers": lambda model, rate: (
        pw.recommend(model, rate, batch_size=128, budget=math.inf).optimizer
    ),
}
print(pw.recommend(model := make_model(), batch_size=128).explain())
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for colour, (name, make) in zip(("C0", "C1", "C2"), METHODS.items(), strict=True):
    curves = {rate: train_autoencoder(make, rate) for rate in RATES}
    best = min(RATES, key=lambda rate: curves[rate][-1])
    print(f"{name:30} best rate {best:g}: {curves[best][-1]:.4f}")
    for rate, losses in curves.items():
        label = f"{name}, rate {rate:g}" if rate == best else None
        axis.plot(range(10, STEPS + 1, 10), losses, "-" if label else ":", color=colour, label=label)
axis.set(yscale="log", xlabel="steps", ylabel="validation loss", title="An autoencoder of digits")
axis.legend()
plt.show()
