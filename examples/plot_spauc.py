"""
SPAUC: a linear scorer that learns from one sample at a time
============================================================

This example trains a linear scorer that ranks a rare digit above the others, and compares three methods. The
loss over all pairs of an eight and another digit has a minimum in closed form, which needs a matrix of size
features by features. `SPAUC` approaches this minimum from one sample at a time; its time and memory per
sample grow linearly with the number of features, because it keeps running means of both classes. The third
method is a logistic regression that also learns sample by sample and averages its weights in the same way.
The measure is the area under the ROC curve (AUC) on test digits, over the number of samples.
"""

# %%
# The training digits contain 30 eights. Each pass over them has another order.

import matplotlib.pyplot as plt
import numpy as np

from plywise.data.digits import load_digits
from plywise.losses import SPAUC
from plywise.losses.spauc import roc_auc

train, validation, test = load_digits()
eights = train.y == 8
selected = ~eights | (eights.cumsum(0) <= 30)
x, y = train.x[selected].double().numpy(), eights[selected].numpy()
x_test = np.concatenate([validation.x, test.x]).astype(float)
y_test = np.concatenate([validation.y, test.y]) == 8
print(f"{len(y)} digits, {y.sum()} of them eights; {len(y_test)} to test, {y_test.sum()} of them eights")

# %%
# The minimum of the loss over pairs. A small ridge is added, since some pixels are always white.

p, u, v = y.mean(), x[y].mean(0), x[~y].mean(0)
scatter = np.cov(x[y].T, bias=True) + np.cov(x[~y].T, bias=True) + np.outer(u - v, u - v)
closed_form = np.linalg.solve(scatter + 1e-3 * np.eye(64), u - v)
print(f"closed form: AUC {roc_auc(x_test @ closed_form, y_test):.4f}")

# %%
# Both online methods learn from the same stream of ten passes. SPAUC uses its default rate; the logistic
# regression uses the best of the rates from 0.1 to 100 that we tried, on other orders.

CHECKPOINTS = [30, 60, 125, 250, 500, *range(1000, 10 * len(y), 500)]


def make_stream(seed):
    orders = np.random.default_rng(seed)
    return np.concatenate([orders.permutation(len(y)) for _ in range(10)])


def train_spauc(rows):
    model, aucs = SPAUC(), []
    for begin, end in zip([0, *CHECKPOINTS], CHECKPOINTS, strict=False):
        chunk = rows[begin:end]
        model.partial_fit(x[chunk], y[chunk], classes=[False, True])
        aucs.append(model.score(x_test, y_test))
    return aucs


def train_logistic(rows, rate=10.0):
    w, bias, mean, aucs = np.zeros(64), 0.0, np.zeros(64), []
    for count, row in enumerate(rows[: CHECKPOINTS[-1]], start=1):
        error = 1 / (1 + np.exp(-(x[row] @ w + bias))) - y[row]
        step = rate / count**0.5
        w, bias = w - step * error * x[row], bias - step * error
        mean += (w - mean) / count
        if count in CHECKPOINTS:
            aucs.append(roc_auc(x_test @ mean, y_test))
    return aucs


orders = [make_stream(seed) for seed in range(4)]
curves = {
    "SPAUC": [train_spauc(rows) for rows in orders],
    "logistic regression": [train_logistic(rows) for rows in orders],
}
first_pass = CHECKPOINTS.index(1000)
for name, aucs in curves.items():
    mean = np.mean(aucs, axis=0)
    early, late = (f"{mean[k]:.4f} after {CHECKPOINTS[k]}" for k in (first_pass, -1))
    print(f"{name}: AUC {early} digits, {late}")

# %%
# The AUC over the number of digits: thin lines are orders, thick lines their means. At the dotted line, each
# digit has been used once.

figure, axis = plt.subplots(figsize=(7, 4))
for color, (name, aucs) in zip(("C1", "C0"), curves.items(), strict=True):
    axis.plot(CHECKPOINTS, np.transpose(aucs), color=color, alpha=0.3, linewidth=0.8)
    axis.plot(CHECKPOINTS, np.mean(aucs, axis=0), color=color, linewidth=2.5, label=name)
axis.axhline(roc_auc(x_test @ closed_form, y_test), color="C2", label="loss over pairs, closed form")
axis.axvline(len(y), color="grey", linestyle=":")
axis.set(
    xscale="log", xlabel="digits used", ylabel="AUC on 697 test digits", title="30 eights in the training set"
)
axis.grid(alpha=0.3)
axis.legend(loc="lower right")
figure.tight_layout()
plt.show()
