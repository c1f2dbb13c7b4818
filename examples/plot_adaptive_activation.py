"""
Activations that learn their slope, in physics-informed networks
================================================================

A physics-informed network learns a function from the equation that it obeys and a few measurements. Here the
equation is div(k grad u) = f on the unit square; u is measured at 100 points, and the diffusion coefficient
k, known at the boundary only, is sought. Four networks try, live but briefly: with fixed tanh; with one
learned slope for the network (GAAF); one for each layer (L-LAAF); one for each neuron (N-LAAF), the last two
with slope recovery. Then follow the longer runs of ``benchmarks/physics_informed.py``, on this problem and on
Burgers' equation, beside the figures of the paper (Jagtap, Kawaguchi, Karniadakis 2020). Its domain, points
and iterations are not those of our runs, so that orders may be compared, not sizes.
"""

# %%
# The problem: u = sin(πx) sin(πy) and k = 1 + a bump. The network gets f, u at points, and the boundary.

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
# The networks: 3 layers of 30, begun alike. `adapt_activations` swaps the activations in place, before the
# optimizer is made. The weights of the loss (1, 10, 10) and Adam's rate are the paper's.


def errors_of(kind):
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


live = {kind: errors_of(kind) for kind in NAMES}
for kind, errors in live.items():
    print(f"live, {ITERATIONS} iterations, {NAMES[kind]:6}: relative L2 error of k {errors[-1]:.3f}")

# %%
# The longer runs, if the file with their figures is there: the errors of the last 1000 iterations (the median
# of ten, since they jump), as median and range over seeds.

here = Path(globals().get("__file__", "here.py")).resolve().parent  # the gallery runs scripts where they are
file = here.parent / "benchmarks" / "physics_informed.json"
long = json.loads(file.read_text()) if file.is_file() else {"problems": {}, "every": 0}
for name, problem in long["problems"].items():
    unit = "error" if name == "poisson" else "iterations"
    print(f"\n{problem['title']}, after {problem['iterations']} iterations, {long['seeds']} seeds")
    reached = f"below {problem['level']} after"
    print(f"{'':20}{'median':>8}{'least':>8}{'most':>8}  {reached:22}  the paper's {unit}")
    for one in problem["kinds"].values():
        own = one["final_error"]
        steps = ", ".join(str(s) if s else "never" for s in one["iterations_to_level"])
        spread = f"{one['median']:8.4f}{min(own):8.4f}{max(own):8.4f}"
        print(f"{one['name']:20}{spread}  {steps:22}  {one['paper'] or 'none'}")
if not long["problems"]:
    print(
        "benchmarks/physics_informed.json is not here: run benchmarks/physics_informed.py of the repository."
    )

# %%
# On the left the live runs, then the longer ones: the median of the seeds, and their range. In the runs that
# the repository holds, slopes tell little on Poisson. On Burgers a slope for the network or for each layer
# gets below 0.2 sooner than fixed tanh; slope recovery with the paper's weight makes the slopes of layers and
# neurons so steep that the solution is lost.

figure, axes = plt.subplots(1, 1 + len(long["problems"]), figsize=(11, 3.6), squeeze=False)
for kind, errors in live.items():
    axes[0, 0].plot(EVERY * np.arange(1, len(errors) + 1), errors, label=NAMES[kind])
axes[0, 0].set(title="live, one seed: error of k", ylabel="relative L2 error")
titles = {"poisson": "longer runs: error of k", "burgers": "longer runs, Burgers: error of u"}
for axis, (name, problem) in zip(axes[0, 1:], long["problems"].items(), strict=True):
    for one in problem["kinds"].values():
        errors = np.array(one["errors"])
        steps = long["every"] * np.arange(1, errors.shape[1] + 1)
        axis.plot(steps, np.median(errors, 0), label=one["name"])
        axis.fill_between(steps, errors.min(0), errors.max(0), alpha=0.15, linewidth=0)
    axis.set(title=titles[name])
for axis in axes[0]:
    axis.set(yscale="log", xlabel="iterations")
    axis.grid(alpha=0.3, which="both")
axes[0, -1].legend(fontsize=8, loc="lower left")
figure.tight_layout()
plt.show()
