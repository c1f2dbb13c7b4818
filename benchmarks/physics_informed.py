"""Compare adaptive activations in physics-informed networks on two problems of Jagtap et al. (2020).

    python benchmarks/physics_informed.py      # writes physics_informed.json and physics_informed.svg

The networks on each problem are: fixed tanh; one slope for the whole network (GAAF); one slope per layer
(L-LAAF) and one per neuron (N-LAAF), both with slope recovery; and one slope per layer without slope
recovery. All start from the same weights and use the same points. The paper is by Jagtap, Kawaguchi and
Karniadakis.

These settings come from the paper: tanh, n, the learning rates of Adam, the weights of the loss, and 3 layers
of 30 (Poisson). The others are ours, since the paper does not state them in the parts that we could read, or
since its settings take more than minutes on one core: the domain and coefficient of the Poisson problem, the
network of Burgers, Xavier initialisation, the numbers of points and iterations, and residual points that are
drawn again in each iteration. Therefore only the ranking of the paper's figures and ours can be compared.

The seeds of one network train together (``torch.vmap`` over their weights), which gives the same arithmetic
in less time. The whole script takes about 12 minutes on one core. It has its own training loop because a
trial of the arena trains one seed on batches of a data set, and here is no data set.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state

from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.losses import slope_recovery
from plywise.nn import adapt_activations

KINDS = {
    "fixed": "fixed",
    "global": "GAAF",
    "layer": "L-LAAF",
    "neuron": "N-LAAF",
    "layer-alone": "L-LAAF, no recovery",
}
SEEDS = 3
EVERY = 100  # iterations between two measurements of the error
NU = 0.01 / math.pi
SPREAD = 0.25  # width of the bump in the diffusion coefficient


@dataclass(frozen=True)
class Problem:
    """An equation, the measurements of its solution, and the settings of a network that learns it.

    Attributes:
        outputs: number of outputs of the network.
        layers: widths of the hidden layers.
        n: factor of the slopes.
        rate: Adam's learning rate.
        weights: weights of the residual, of the data, and of slope recovery in the loss.
        data: inputs (M, 2) and targets (M, outputs), NaN where a target is unknown.
        points: residual points (shape, 2), drawn again in each iteration.
        residual: residual of the equation, from points and outputs.
        truth: points, and the true values of output ``evaluated`` there.
        evaluated: index of the output whose error is measured.
        level: an error that the fixed network reached after about half of the iterations in short separate
            runs.
        paper: the paper's figures: errors (Poisson), iterations (Burgers).
    """

    title: str
    outputs: int
    layers: tuple[int, ...]
    n: int
    rate: float
    weights: tuple[float, float, float]
    iterations: int
    data: Callable[[Generator], tuple[Tensor, Tensor]]
    points: Callable[[Generator], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]
    truth: Callable[[], tuple[Tensor, Tensor]]
    evaluated: int
    level: float
    paper: dict[str, float]


def compute_derivative(y: Tensor, x: Tensor) -> Tensor:
    """Return ∂y/∂x at each point, (..., 2), which can be differentiated again."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


# Inverse Poisson problem: div(k grad u) = f on the unit square. u is measured at some points, k only at the
# boundary; the network estimates k inside.


def compute_coefficient(x: Tensor) -> Tensor:
    return 1 + torch.exp(-(x - 0.5).square().sum(-1) / (2 * SPREAD**2))


def compute_potential(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(-1)


def compute_source(x: Tensor) -> Tensor:
    """Return the right-hand side, grad k · grad u + k Δu."""
    k, u = compute_coefficient(x), compute_potential(x)
    grad_k = -(x - 0.5) / SPREAD**2 * (k - 1)[..., None]
    grad_u = math.pi * torch.cos(math.pi * x) * torch.sin(math.pi * x.flip(-1))
    return (grad_k * grad_u).sum(-1) - 2 * math.pi**2 * k * u


def compute_poisson_residual(x: Tensor, y: Tensor) -> Tensor:
    flux = y[..., 1:] * compute_derivative(y[..., 0], x)
    return sum(compute_derivative(flux[..., i], x)[..., i] for i in range(2)) - compute_source(x)


def draw_poisson_data(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw 100 inner points, where u is known, and make 40 boundary points, where u and k are known."""
    inside = torch.rand(100, 2, generator=generator)
    along, zero = torch.linspace(0, 1, 11)[:-1], torch.zeros(10)
    sides = [(along, zero), (1 + zero, along), (1 - along, 1 + zero), (zero, 1 - along)]
    boundary = torch.cat([torch.stack(side, 1) for side in sides])
    known = torch.stack([compute_potential(inside), torch.full((100,), torch.nan)], 1)
    at_boundary = torch.stack([torch.zeros(40), compute_coefficient(boundary)], 1)
    return torch.cat([inside, boundary]), torch.cat([known, at_boundary])


def compute_poisson_truth() -> tuple[Tensor, Tensor]:
    side = torch.linspace(0, 1, 51)
    x = torch.cartesian_prod(side, side)
    return x, compute_coefficient(x)


# Burgers: u_t + u u_x = ν u_xx on x in [-1, 1], t in [0, 1]; u(x, 0) = -sin(πx), u(±1, t) = 0.


def compute_burgers_residual(x: Tensor, y: Tensor) -> Tensor:
    u = y[..., 0]
    u_x, u_t = compute_derivative(u, x).unbind(-1)
    return u_t + u * u_x - NU * compute_derivative(u_x, x)[..., 0]


def draw_burgers_data(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw 50 points at t = 0 and 25 at each end of the interval."""
    x, t = 2 * torch.rand(50, generator=generator) - 1, torch.rand(50, generator=generator)
    ends = torch.tensor([-1.0, 1.0]).repeat_interleave(25)
    inputs = torch.cat([torch.stack([x, torch.zeros(50)], 1), torch.stack([ends, t], 1)])
    return inputs, torch.cat([-torch.sin(math.pi * x), torch.zeros(50)])[:, None]


def draw_burgers_points(generator: Generator) -> Tensor:
    return torch.rand(256, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


def solve_by_cole_hopf(x: np.ndarray, t: np.ndarray, nodes: int = 200) -> np.ndarray:
    """Return the exact solution, by the Cole-Hopf transform with Gauss-Hermite quadrature.

    u = -∫ sin(πy) w(y) dη / ∫ w(y) dη with y = x - √(4νt) η and w = exp(-cos(πy)/(2πν) - η²).
    """
    eta, weight = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - np.sqrt(4 * NU * t[..., None]) * eta
    power = -np.cos(np.pi * y) / (2 * np.pi * NU)
    w = weight * np.exp(power - power.max(-1, keepdims=True))
    return -(np.sin(np.pi * y) * w).sum(-1) / w.sum(-1)


def compute_burgers_truth() -> tuple[Tensor, Tensor]:
    x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0, 1, 26), indexing="ij")
    inputs = np.stack([x.ravel(), t.ravel()], 1)
    return torch.from_numpy(inputs).float(), torch.from_numpy(
        solve_by_cole_hopf(x.ravel(), t.ravel())
    ).float()


PROBLEMS = {
    "poisson": Problem(
        title="Poisson, inverse: relative L2 error of the diffusion coefficient",
        outputs=2,
        layers=(30,) * 3,
        n=1,
        rate=8e-4,
        weights=(1.0, 10.0, 10.0),
        iterations=4000,
        data=draw_poisson_data,
        points=lambda generator: torch.rand(200, 2, generator=generator),
        residual=compute_poisson_residual,
        truth=compute_poisson_truth,
        evaluated=1,
        level=0.1,
        paper={"fixed": 0.1012, "global": 0.01654, "layer": 0.00733, "neuron": 0.01482},
    ),
    "burgers": Problem(
        title="Burgers: relative L2 error of the solution",
        outputs=1,
        layers=(20,) * 6,
        n=5,
        rate=6e-4,
        weights=(1.0, 10.0, 20.0),
        iterations=8000,
        data=draw_burgers_data,
        points=draw_burgers_points,
        residual=compute_burgers_residual,
        truth=compute_burgers_truth,
        evaluated=0,
        level=0.2,
        paper={"fixed": 14750, "global": 13600, "layer": 11090, "neuron": 11170},
    ),
}


class NetworkWithRecovery(nn.Module):
    """A network and its slope recovery term in one forward, for ``functional_call``."""

    def __init__(self, problem: Problem, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        widths = [2, *problem.layers]
        hidden = [m for d, e in pairwise(widths) for m in (nn.Linear(d, e), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(widths[-1], problem.outputs))
        for layer in self.network[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        if kind != "fixed":
            adapt_activations(self.network, kind.split("-")[0], n=problem.n, example=torch.zeros(1, 2))
        # the global slope comes from an earlier paper, which has no slope recovery
        self.recovers = kind in ("layer", "neuron")

    def forward(self, points: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        recovery = slope_recovery(self.network) if self.recovers else points.new_zeros(())
        return self.network(points), self.network(inputs), recovery


def train(
    problem: Problem, kind: str, seeds: int, iterations: int
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Return the errors (seeds × evaluations) and the final weights, stacked over the seeds."""
    trainees = [NetworkWithRecovery(problem, kind, seed) for seed in range(seeds)]
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    inputs, targets = (torch.stack(part) for part in zip(*map(problem.data, generators), strict=True))
    known = ~targets.isnan()
    grid, truth = problem.truth()
    parameters, _ = stack_module_state(trainees)
    forward = torch.vmap(lambda curve, *args: functional_call(trainees[0], curve, args))
    optimizer = torch.optim.Adam(parameters.values(), lr=problem.rate)
    of_residual, of_data, of_slopes = problem.weights
    errors: list[list[float]] = [[] for _ in range(seeds)]
    for iteration in range(1, iterations + 1):
        points = torch.stack([problem.points(generator) for generator in generators]).requires_grad_()
        y, fit, recovery = forward(parameters, points, inputs)
        loss = of_residual * problem.residual(points, y).square().mean()
        loss = loss + of_data * (fit - targets)[known].square().mean() + of_slopes * recovery.mean()
        optimizer.zero_grad()
        (seeds * loss).backward()  # a sum over the seeds, which keeps their gradients independent
        optimizer.step()
        if iteration % EVERY == 0:
            with torch.no_grad():
                same = grid.expand(seeds, -1, -1)
                evaluated = forward(parameters, same, same[:, :1])[0][..., problem.evaluated]
            for curve, error in zip(errors, (evaluated - truth).norm(dim=1) / truth.norm(), strict=True):
                curve.append(error.item())
    return errors, {name: value.detach() for name, value in parameters.items()}


def compute_slopes(problem: Problem, parameters: dict[str, Tensor]) -> list[list[float]]:
    """Return n · slope of each layer (mean over its neurons) for each seed."""
    means = [
        problem.n * value.reshape(len(value), -1).mean(1)
        for name, value in parameters.items()
        if name.endswith("slope")
    ]
    return torch.stack(means, 1).tolist() if means else []


def run_kind(problem: Problem, kind: str, seeds: int, iterations: int) -> dict[str, Any]:
    """Train one kind of network, and return its final errors, all errors and its slopes."""
    start = time.process_time()
    errors, parameters = train(problem, kind, seeds, iterations)
    final = [statistics.median(curve[-10:]) for curve in errors]  # single errors jump
    return {
        "name": KINDS[kind],
        "final_error": final,
        "median": statistics.median(final),
        "iterations_to_level": [
            next((EVERY * (i + 1) for i, e in enumerate(curve) if e < problem.level), None)
            for curve in errors
        ],
        "slopes": compute_slopes(problem, parameters),
        "errors": [[float(f"{e:.4g}") for e in curve] for curve in errors],
        "cpu_seconds": round(time.process_time() - start, 1),
        "paper": problem.paper.get(kind),
    }


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """Draw the errors over iterations: the median of the seeds and their range."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result["problems"]), figsize=(10, 3.8))
    for axis, problem in zip(axes, result["problems"].values(), strict=True):
        for row in problem["kinds"].values():
            errors = np.array(row["errors"])
            steps = EVERY * np.arange(1, errors.shape[1] + 1)
            axis.plot(steps, np.median(errors, 0), label=row["name"])
            axis.fill_between(steps, errors.min(0), errors.max(0), alpha=0.15, linewidth=0)
        axis.set(yscale="log", xlabel="iterations", title=problem["title"])
        axis.title.set_size(9.5)
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(f"median of {result['seeds']} seeds, and their range")
    axes[-1].legend()
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--kind",
        action="append",
        choices=list(KINDS),
        help="train this kind only and keep the others; repeat it; default: all",
    )
    kinds = parser.parse_args().kind or list(KINDS)
    torch.set_num_threads(1)
    here = Path(__file__)
    file = here.with_suffix(".json")
    before = json.loads(file.read_text())["problems"] if file.is_file() else {}
    result: dict[str, Any] = {
        "environment": {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **environment()},
        "seeds": SEEDS,
        "every": EVERY,
        "problems": {},
    }
    for name, problem in PROBLEMS.items():
        rows = before.get(name, {}).get("kinds", {})
        for kind in kinds:
            rows[kind] = row = run_kind(problem, kind, SEEDS, problem.iterations)
            errors = ", ".join(f"{error:.4f}" for error in row["final_error"])
            print(
                f"{name:8} {row['name']:22} errors {errors}; below {problem.level} after "
                f"{row['iterations_to_level']}; {row['cpu_seconds']} s of CPU; the paper's {row['paper']}",
                flush=True,
            )
        result["problems"][name] = {
            "title": problem.title,
            "iterations": problem.iterations,
            "level": problem.level,
            "layers": problem.layers,
            "n": problem.n,
            "rate": problem.rate,
            "weights": problem.weights,
            "kinds": {kind: rows[kind] for kind in KINDS if kind in rows},
        }
    write_whole(file, json.dumps(result, indent=1) + "\n")
    draw_picture(result, here.with_suffix(".svg"))


if __name__ == "__main__":
    main()
