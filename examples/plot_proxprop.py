"""
ProxProp: an implicit step in each layer
========================================

This example compares SGD with ``plywise.ProxProp`` on SGD at learning rates from 0.01 to 30, with the same
initial weights and the same batches of digits. SGD takes the explicit step of backpropagation; ``ProxProp``
solves a small least-squares problem in each layer. It works best at larger rates, and its lowest loss is
lower. After `"Proximal Backpropagation"
<https://arxiv.org/abs/1706.04638>`_ (Frerix et al., 2018).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, RATES = 150, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
train, _, _ = load_digits()


def compute_final_loss(rate, rule=None):
    """Train, and return the loss on all training digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if rule is not None:
        rule.attach(model, optimizer)
    for _ in range(STEPS):
        rows = torch.randint(len(train.x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(train.x), train.y).item()


# %%
# The two methods differ by one line: ``rule.attach(model, optimizer)``.

losses = {"SGD": [compute_final_loss(rate) for rate in RATES]}
losses["ProxProp on SGD"] = [compute_final_loss(rate, pw.ProxProp()) for rate in RATES]
for name, values in losses.items():
    print(
        f"{name:16}", "  ".join(f"{rate:g}: {value:.3g}" for rate, value in zip(RATES, values, strict=True))
    )

# %%
# The plot leaves out losses above 10.

figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for name, values in losses.items():
    axis.plot(RATES, [value if value < 10 else float("nan") for value in values], "o-", label=name)
axis.set(xscale="log", yscale="log", xlabel="rate", ylabel="training loss at the end", title=f"{STEPS} steps")
axis.legend()
plt.show()
