"""
SPAUC: a linear scorer that sees each sample once
=================================================

A linear score shall put a rare digit above the others. The loss over all pairs of an eight and another digit
has its minimum in closed form, at the price of a matrix of all features by all features. `SPAUC` nears it
from one sample at a time, in time and memory of the features alone, because it keeps running means of both
classes. We watch the area under the ROC curve (AUC) on test digits as samples go by, beside the closed form
and beside a plain logistic regression that learns sample by sample too, its weights averaged alike.
"""

# %%
# Digits with 30 eights among the others to learn from, as they come; then again, in another order.

import matplotlib.pyplot as plt
import numpy as np

from plywise.data.digits import load_digits
from plywise.losses import SPAUC
from plywise.losses.spauc import roc_auc

train, validation, test = load_digits()
eights = train.y == 8
kept = ~eights | (eights.cumsum(0) <= 30)
x, y = train.x[kept].double().numpy(), eights[kept].numpy()
x_test = np.concatenate([validation.x, test.x]).astype(float)
y_test = np.concatenate([validation.y, test.y]) == 8
print(f"{len(y)} digits, {y.sum()} of them eights; {len(y_test)} to test, {y_test.sum()} of them eights")

# %%
# The minimum of the loss over pairs, with a little ridge, since some pixels are always white.

p, u, v = y.mean(), x[y].mean(0), x[~y].mean(0)
scatter = np.cov(x[y].T, bias=True) + np.cov(x[~y].T, bias=True) + np.outer(u - v, u - v)
closed = np.linalg.solve(scatter + 1e-3 * np.eye(64), u - v)
print(f"closed form: AUC {roc_auc(x_test @ closed, y_test):.4f}")

# %%
# Both learn from the same stream, ten passes; SPAUC with its default rate, the logistic regression with the
# best of those from 0.1 to 100 that were tried, on other orders.

LOOKS = [30, 60, 125, 250, 500, *range(1000, 10 * len(y), 500)]


def stream(seed):
    orders = np.random.default_rng(seed)
    return np.concatenate([orders.permutation(len(y)) for _ in range(10)])


def spauc(rows):
    model, areas = SPAUC(), []
    for begin, end in zip([0, *LOOKS], LOOKS, strict=False):
        part = rows[begin:end]
        model.partial_fit(x[part], y[part], classes=[False, True])
        areas.append(model.score(x_test, y_test))
    return areas


def logistic(rows, rate=10.0):
    w, bias, mean, areas = np.zeros(64), 0.0, np.zeros(64), []
    for count, row in enumerate(rows[: LOOKS[-1]], start=1):
        error = 1 / (1 + np.exp(-(x[row] @ w + bias))) - y[row]
        step = rate / count**0.5
        w, bias = w - step * error * x[row], bias - step * error
        mean += (w - mean) / count
        if count in LOOKS:
            areas.append(roc_auc(x_test @ mean, y_test))
    return areas


orders = [stream(seed) for seed in range(4)]
curves = {
    "SPAUC": [spauc(rows) for rows in orders],
    "logistic regression": [logistic(rows) for rows in orders],
}
once = LOOKS.index(1000)
for name, areas in curves.items():
    mean = np.mean(areas, axis=0)
    print(f"{name}: AUC {mean[once]:.4f} after {LOOKS[once]} digits, {mean[-1]:.4f} after {LOOKS[-1]}")

# %%
# AUC against the digits seen: a thin line for each order, a thick one for their mean. At the dotted line
# each digit has been seen once.

figure, axis = plt.subplots(figsize=(7, 4))
for color, (name, areas) in zip(("C1", "C0"), curves.items(), strict=True):
    axis.plot(LOOKS, np.transpose(areas), color=color, alpha=0.3, linewidth=0.8)
    axis.plot(LOOKS, np.mean(areas, axis=0), color=color, linewidth=2.5, label=name)
axis.axhline(roc_auc(x_test @ closed, y_test), color="C2", label="loss over pairs, closed form")
axis.axvline(len(y), color="grey", linestyle=":")
axis.set(xscale="log", xlabel="digits seen", ylabel="AUC on 697 test digits", title="30 eights to learn from")
axis.grid(alpha=0.3)
axis.legend(loc="lower right")
figure.tight_layout()
plt.show()
