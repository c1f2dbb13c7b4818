"""
The recommended method: Muon and AdamW in better coordinates
============================================================

``plywise.recommend(model)`` makes Muon for hidden weights and AdamW for all others. On layers where it is
worth the time, they work in the eigenbasis of the layer's inputs (``plywise.Coordinates``): on layers with
many rows in a batch, and often on the output layer. In this small network that is the output layer alone. It
is used as any optimizer. The picture compares it with AdamW on an autoencoder of digits, each at its best of
three rates, and with coordinates on all layers, which a larger ``budget`` allows.
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


def curve(make, rate):
    model, found = make_model(), []
    optimizer = make(model, rate)
    for step, rows in enumerate(torch.randint(len(train.x), (STEPS, 128))):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(train.x[rows]), train.x[rows]).backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                found.append(nn.functional.mse_loss(model(validation.x), validation.x).item())
    return found


# %%
# First what was chosen, and what that costs. In the picture, a dotted line is a rate that was not the best.
WAYS = {
    "AdamW": lambda model, rate: torch.optim.AdamW(model.parameters(), rate),
    "recommended": lambda model, rate: pw.recommend(model, rate, batch_size=128).optimizer,
    "recommended, all layers turned": lambda model, rate: (
        pw.recommend(model, rate, batch_size=128, budget=math.inf).optimizer
    ),
}
print(pw.recommend(model := make_model(), batch_size=128).explain())
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for colour, (name, make) in zip(("C0", "C1", "C2"), WAYS.items(), strict=True):
    curves = {rate: curve(make, rate) for rate in RATES}
    best = min(RATES, key=lambda rate: curves[rate][-1])
    print(f"{name:30} best rate {best:g}: {curves[best][-1]:.4f}")
    for rate, losses in curves.items():
        label = f"{name}, rate {rate:g}" if rate == best else None
        axis.plot(range(10, STEPS + 1, 10), losses, "-" if label else ":", color=colour, label=label)
axis.set(yscale="log", xlabel="steps", ylabel="validation loss", title="An autoencoder of digits")
axis.legend()
plt.show()
