"""
Straight-through training compared with the optimum
===================================================

This example trains a network of threshold neurons with four straight-through estimators, and compares the
losses with an optimum. Neurons that output 0 or 1 have no useful gradient, so one usually replaces it by a
straight-through estimator. For small data, the best network over many random neurons can be computed exactly:
over the activation patterns of these neurons, the regularised loss is a LASSO. All methods fit the same 300
digits, odd against even. Three of the four estimators stay above the optimum for two layers. One goes below
it, since it moves its neurons to patterns that are not among the 2,000 random ones. The optimum for three
layers is a lower bound for all.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.nn import Threshold, ThresholdNetwork
from plywise.nn.threshold import ESTIMATORS

BETA, STEPS, HIDDEN = 2.0, 400, 300
train, _, test = load_digits()
mean, spread = train.x.mean(0), train.x.std(0) + 0.1
x, x_test = (((part.x - mean) / spread).double() for part in (train, test))
y, y_test = (1.0 - 2.0 * (part.y % 2).double() for part in (train, test))
x, y = x[:300], y[:300]

# %%
# The optimum for two and for three layers. The network keeps only the hidden neurons whose weight is not
# zero.

optimum = {layers: ThresholdNetwork(BETA, layers=layers).fit(x, y) for layers in (2, 3)}
for layers, fit in optimum.items():
    accuracy = (fit.predict(x_test) * y_test > 0).double().mean().item()
    print(f"{layers} layers: objective {fit.objective:.2f}, test accuracy {accuracy:.3f}; {fit.network}")

# %%
# The same objective, minimised by gradients with each estimator.

curves = {}
for estimator in ESTIMATORS:
    torch.manual_seed(0)
    hidden, activation = nn.Linear(64, HIDDEN), Threshold(estimator=estimator)
    model = nn.Sequential(hidden, activation, nn.Linear(HIDDEN, 1, bias=False)).double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    curve = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x)[:, 0] - y).square().sum() / 2 + BETA * model[2].weight.abs().sum()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    with torch.no_grad():
        accuracy = (model(x_test)[:, 0] * y_test > 0).double().mean().item()
    curves[estimator] = curve
    print(f"{estimator:12} lowest objective {min(curve):.2f}, test accuracy {accuracy:.3f}")

# %%
# The objective during training.

figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
for estimator, curve in curves.items():
    axis.plot(curve, label=f"straight through: {estimator}")
axis.axhline(optimum[2].objective, color="black", label="optimum over 2,000 random neurons")
axis.axhline(optimum[3].objective, color="black", ls=":", label="optimum, 3 layers")
axis.set(xlabel="steps of Adam", ylabel="loss + β ‖w‖₁", yscale="log", title="300 digits, odd against even")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
