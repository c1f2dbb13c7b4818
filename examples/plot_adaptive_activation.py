"""
Trainable activation slopes in physics-informed networks
========================================================

This example compares a fixed tanh with three activations whose slope is trained, in a physics-informed
network: a network that learns a function from its differential equation and a few measurements. The equation
is div(k grad u) = f on the unit square; u is measured at 100 points, and the network estimates the diffusion
coefficient k, which is known only at the boundary. The trained slope belongs to the whole network (GAAF), to
each layer (L-LAAF) or to each neuron (N-LAAF); the last two use slope recovery. Four short runs are followed
by the results of the longer runs of ``benchmarks/physics_informed.py``, on this problem and on Burgers'
equation, next to the figures of the paper (Jagtap, Kawaguchi, Karniadakis 2020). The paper uses another
domain, other points and other numbers of iterations: compare the ranking of the methods, not the errors.
"""

# %%
# The problem: u = sin(πx) sin(πy), and k is 1 plus a Gaussian bump. The network is given f and u at some
# points, and the values of both functions at the boundary.

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from plywise.losses import slope_recovery
from plywise.nn import adapt_activations

torch.set_num_threads(1)
NAMES = {"fixed": "fixed", "global": "GAAF", "layer": "L-LAAF", "neuron": "N-LAAF"}
ITERATIONS, EVERY = 300, 20


def coefficient(x):
    return 1 + torch.exp(-8 * (x - 0.5).square().sum(1))


def potential(x):
    return torch.sin(math.pi * x).prod(1)


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def divergence(k, u, x):
    flux = k[:, None] * gradient(u, x)
    return gradient(flux[:, 0], x)[:, 0] + gradient(flux[:, 1], x)[:, 1]


torch.manual_seed(0)
inside = torch.rand(100, 2)
side, zero = torch.linspace(0, 1, 11), torch.zeros(11)
edges = [(side, zero), (side, zero + 1), (zero, side), (zero + 1, side)]
boundary = torch.cat([torch.stack(edge, 1) for edge in edges])
residual_points = torch.rand(200, 2, requires_grad=True)
f = divergence(coefficient(residual_points), potential(residual_points), residual_points).detach()
grid = torch.cartesian_prod(torch.linspace(0, 1, 41), torch.linspace(0, 1, 41))

# %%
# All networks have 3 layers of 30 units and start from the same weights. `adapt_activations` replaces the
# activations in place, before the optimizer is created. The weights of the loss terms (1, 10, 10) and Adam's
# learning rate are those of the paper.


def train_network(kind):
    torch.manual_seed(1)
    model = nn.Sequential(
        *(m for d in (2, 30, 30) for m in (nn.Linear(d, 30), nn.Tanh())),
        nn.Linear(30, 2),
    )
    for layer in model[::2]:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    if kind != "fixed":
        adapt_activations(model, kind, n=1, example=inside)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-4)
    errors = []
    for step in range(ITERATIONS):
        u, k = model(residual_points).unbind(1)
        at_edges = model(boundary)
        loss = (divergence(k, u, residual_points) - f).square().mean()
        loss = loss + 10 * (model(inside)[:, 0] - potential(inside)).square().mean()
        loss = (
            loss + 10 * (at_edges[:, 0].square() + (at_edges[:, 1] - coefficient(boundary)).square()).mean()
        )
        if kind in ("layer", "neuron"):
            loss = loss + 10 * slope_recovery(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                off = model(grid)[:, 1] - coefficient(grid)
                errors.append((off.norm() / coefficient(grid).norm()).item())
    return errors


short_runs = {kind: train_network(kind) for kind in NAMES}
for kind, errors in short_runs.items():
    print(f"short run, {ITERATIONS} iterations, {NAMES[kind]:6}: relative L2 error of k {errors[-1]:.3f}")

# %%
# The longer runs, if the file with their results exists. The error of a run is the median of ten values from
# its last 1000 iterations, since single values jump; the table shows the median and the range over seeds.

here = Path(globals().get("__file__", "here.py")).resolve().parent  # the gallery sets the working folder
file = here.parent / "benchmarks" / "physics_informed.json"
long_runs = json.loads(file.read_text()) if file.is_file() else {"problems": {}, "every": 0}
for name, problem in long_runs["problems"].items():
    unit = "error" if name == "poisson" else "iterations"
    print(f"\n{problem['title']}, after {problem['iterations']} iterations, {long_runs['seeds']} seeds")
    reached = f"below {problem['level']} after"
    print(f"{'':20}{'median':>8}{'min':>8}{'max':>8}  {reached:22}  the paper's {unit}")
    for result in problem["kinds"].values():
        final_errors = result["final_error"]
        steps = ", ".join(str(s) if s else "never" for s in result["iterations_to_level"])
        spread = f"{result['median']:8.4f}{min(final_errors):8.4f}{max(final_errors):8.4f}"
        print(f"{result['name']:20}{spread}  {steps:22}  {result['paper'] or 'none'}")
if not long_runs["problems"]:
    print(
        "benchmarks/physics_informed.json is missing: run benchmarks/physics_informed.py of the repository."
    )

# %%
# The left plot shows the short runs, the other plots show the median and the range over seeds of the longer
# runs. In the results stored in the repository, trained slopes make little difference on Poisson. On Burgers,
# one slope for the network or for each layer gets below 0.2 sooner than fixed tanh; slope recovery with the
# paper's weight makes the slopes of layers and neurons so steep that the solution is lost.

figure, axes = plt.subplots(1, 1 + len(long_runs["problems"]), figsize=(11, 3.6), squeeze=False)
for kind, errors in short_runs.items():
    axes[0, 0].plot(EVERY * np.arange(1, len(errors) + 1), errors, label=NAMES[kind])
axes[0, 0].set(title="short runs, one seed: error of k", ylabel="relative L2 error")
titles = {"poisson": "longer runs: error of k", "burgers": "longer runs, Burgers: error of u"}
for axis, (name, problem) in zip(axes[0, 1:], long_runs["problems"].items(), strict=True):
    for result in problem["kinds"].values():
        errors = np.array(result["errors"])
        steps = long_runs["every"] * np.arange(1, errors.shape[1] + 1)
        axis.plot(steps, np.median(errors, 0), label=result["name"])
        axis.fill_between(steps, errors.min(0), errors.max(0), alpha=0.15, linewidth=0)
    axis.set(title=titles[name])
for axis in axes[0]:
    axis.set(yscale="log", xlabel="iterations")
    axis.grid(alpha=0.3, which="both")
axes[0, -1].legend(fontsize=8, loc="lower left")
figure.tight_layout()
plt.show()
