"""
Every rule on the same network
==============================

This example trains the same network on the same batches of digits with each of plywise's rules, on momentum
SGD at the best of four rates. It shows how to attach the rules and how differently they train; it is not a
ranking. For a ranking, tune each method (``plywise bench --workloads digits-mlp --methods sgd,foof,rls``).
"""

import math
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.data.digits import load_digits

STEPS, RATES = 100, (0.03, 0.1, 0.3, 1.0)
warnings.simplefilter("ignore", RuntimeWarning)  # from rates that are too large
train, validation, _ = load_digits()
mean, spread = train.x.mean(), train.x.std()
x, x_validation = (train.x - mean) / spread, (validation.x - mean) / spread

# %%
# Some rules need only the current batch and act in backward. Others keep running statistics of all batches,
# and refresh what they compute from them at intervals.

RULES = {
    "Backprop": pw.Backprop(),
    "ProxProp": pw.ProxProp(),
    "Consequentialism": pw.Consequentialism(),
    "BackMatching": pw.BackMatching(),
    "NLMS": pw.NLMS(),
    "RLS": pw.RLS(),
    "FeatureWhitening": pw.FeatureWhitening(),
    "AdaBK": pw.AdaBK(),
    "KFAC": pw.KFAC(),
    "Foof": pw.Foof(),
    "Precondition": pw.Precondition(),
    "GradientAmplification": pw.GradientAmplification(every=20, rest=1),
}


def run(rule, rate):
    """Train, and return the validation loss after every tenth step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    rule.attach(model, optimizer)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), train.y[rows]).backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                losses.append(cross_entropy(model(x_validation), validation.y).item())
    rule.detach()
    return losses


# %%
# Each rule is shown at the best of the rates.


def compute_end_loss(losses):
    """Return the last loss, or infinity if it is not finite."""
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


curves = {}
for name, rule in RULES.items():
    losses_by_rate = {rate: run(rule, rate) for rate in RATES}
    best = min(
        losses_by_rate, key=lambda rate, losses_by_rate=losses_by_rate: compute_end_loss(losses_by_rate[rate])
    )
    curves[f"{name}, rate {best:g}"] = losses_by_rate[best]
    print(f"{name:22} rate {best:g}: validation loss {losses_by_rate[best][-1]:.3f}")

# %%
# The validation loss over steps. A step costs more with some rules than with others: see the table in the
# explanation of costs.

figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
for number, (label, losses) in enumerate(curves.items()):
    style = "k--" if label.startswith("Backprop") else "-" if number < 7 else "-."
    axis.plot(range(10, STEPS + 1, 10), losses, style, label=label)
axis.set(
    xlabel="steps",
    ylabel="validation loss, nats",
    yscale="log",
    ylim=(0.05, 3),
    title="Digits, the best of four rates",
)
axis.legend(fontsize=8)
plt.show()
