"""
Every rule on the same network
==============================

The same network and the same batches of digits under each of plywise's rules, on momentum SGD at the best of
four rates. This is a picture of how they are attached and of how differently they train, not a ranking: for
that, tune each one (``plywise bench --workloads digits-mlp --methods sgd,foof,rls``).
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
warnings.simplefilter("ignore", RuntimeWarning)  # of steps that a rate too large makes infinite
train, validation, _ = load_digits()
mean, spread = train.x.mean(), train.x.std()
x, x_validation = (train.x - mean) / spread, (validation.x - mean) / spread

# %%
# Rules of one batch answer in backward; those with running statistics learn from all batches and refresh what
# they make of them now and then.

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
    """The validation loss after every tenth step."""
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
# Each at the best of the rates.


def end_of(losses):
    """The last loss, and infinity where there is none."""
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


curves = {}
for name, rule in RULES.items():
    rates = {rate: run(rule, rate) for rate in RATES}
    best = min(rates, key=lambda rate, rates=rates: end_of(rates[rate]))
    curves[f"{name}, rate {best:g}"] = rates[best]
    print(f"{name:22} rate {best:g}: validation loss {rates[best][-1]:.3f}")

# %%
# Validation loss against steps. A step of one rule costs more than a step of another:
# see the table in the explanation of costs.

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
