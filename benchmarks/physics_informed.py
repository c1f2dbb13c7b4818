"""Adaptive activations in physics-informed networks: two problems of Jagtap, Kawaguchi, Karniadakis (2020).

    python benchmarks/physics_informed.py      # writes physics_informed.json and physics_informed.svg

Networks on each problem: fixed tanh; one slope for the network (GAAF); one a layer (L-LAAF) and one a neuron
(N-LAAF), both with slope recovery; one a layer without it. All start from the same weights and see the same
points.

From the paper: tanh, n, the learning rates of Adam, the weights of the loss, 3 layers of 30 (Poisson).
Ours, since the paper's are not in what we could read, or do not fit into minutes of one core: the domain and
coefficient of the Poisson problem, the network of Burgers, Xavier initialisation, numbers of points and
iterations, residual points drawn again in each iteration. So the paper's figures and ours compare in their
order only.

The seeds of one network train side by side (``torch.vmap`` over their weights): the same arithmetic as one
after the other, in less time. All of it takes about 12 minutes of one core. This is why the script has a loop
of its own: a trial of the arena trains one seed, on batches of a data set, and there is none here.
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
EVERY = 100  # iterations from one error to the next
NU = 0.01 / math.pi
SPREAD = 0.25  # of the bump in the diffusion coefficient


@dataclass(frozen=True)
class Problem:
    """An equation, what is measured of its solution, and how a network learns it.

    Attributes:
        outputs: numbers that the network gives at a point.
        layers: widths of the hidden layers.
        n: factor of the slopes.
        rate: Adam's learning rate.
        weights: of the residual, of the data, of slope recovery.
        data: inputs (M, 2) and targets (M, outputs), NaN where a target is not known.
        points: residual points (shape, 2), drawn again in each iteration.
        residual: of the equation, from points and outputs.
        truth: points and what output ``judged`` should be there.
        judged: which output.
        level: an error that the fixed network reaches in about half of the iterations (of short runs of it
            alone).
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
    judged: int
    level: float
    paper: dict[str, float]


def derivative(y: Tensor, x: Tensor) -> Tensor:
    """∂y/∂x at each point, (..., 2), differentiable once more."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


# Poisson, inverse: div(k grad u) = f on the unit square. u is measured at points, k at the boundary only;
# k within is sought.


def coefficient(x: Tensor) -> Tensor:
    return 1 + torch.exp(-(x - 0.5).square().sum(-1) / (2 * SPREAD**2))


def potential(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(-1)


def source(x: Tensor) -> Tensor:
    """The right-hand side, grad k · grad u + k Δu."""
    k, u = coefficient(x), potential(x)
    grad_k = -(x - 0.5) / SPREAD**2 * (k - 1)[..., None]
    grad_u = math.pi * torch.cos(math.pi * x) * torch.sin(math.pi * x.flip(-1))
    return (grad_k * grad_u).sum(-1) - 2 * math.pi**2 * k * u


def poisson_residual(x: Tensor, y: Tensor) -> Tensor:
    flux = y[..., 1:] * derivative(y[..., 0], x)
    return sum(derivative(flux[..., i], x)[..., i] for i in range(2)) - source(x)


def poisson_data(generator: Generator) -> tuple[Tensor, Tensor]:
    """100 points within, where u is known; 40 at the boundary, where u and k are."""
    inside = torch.rand(100, 2, generator=generator)
    along, zero = torch.linspace(0, 1, 11)[:-1], torch.zeros(10)
    sides = [(along, zero), (1 + zero, along), (1 - along, 1 + zero), (zero, 1 - along)]
    boundary = torch.cat([torch.stack(side, 1) for side in sides])
    known = torch.stack([potential(inside), torch.full((100,), torch.nan)], 1)
    at_boundary = torch.stack([torch.zeros(40), coefficient(boundary)], 1)
    return torch.cat([inside, boundary]), torch.cat([known, at_boundary])


def poisson_truth() -> tuple[Tensor, Tensor]:
    side = torch.linspace(0, 1, 51)
    x = torch.cartesian_prod(side, side)
    return x, coefficient(x)


# Burgers: u_t + u u_x = ν u_xx on x in [-1, 1], t in [0, 1]; u(x, 0) = -sin(πx), u(±1, t) = 0.


def burgers_residual(x: Tensor, y: Tensor) -> Tensor:
    u = y[..., 0]
    u_x, u_t = derivative(u, x).unbind(-1)
    return u_t + u * u_x - NU * derivative(u_x, x)[..., 0]


def burgers_data(generator: Generator) -> tuple[Tensor, Tensor]:
    """50 points at t = 0, 25 at each end."""
    x, t = 2 * torch.rand(50, generator=generator) - 1, torch.rand(50, generator=generator)
    ends = torch.tensor([-1.0, 1.0]).repeat_interleave(25)
    inputs = torch.cat([torch.stack([x, torch.zeros(50)], 1), torch.stack([ends, t], 1)])
    return inputs, torch.cat([-torch.sin(math.pi * x), torch.zeros(50)])[:, None]


def burgers_points(generator: Generator) -> Tensor:
    return torch.rand(256, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


def cole_hopf(x: np.ndarray, t: np.ndarray, nodes: int = 200) -> np.ndarray:
    """The exact solution, by the Cole-Hopf transform with Gauss-Hermite quadrature.

    u = -∫ sin(πy) w(y) dη / ∫ w(y) dη with y = x - √(4νt) η and w = exp(-cos(πy)/(2πν) - η²).
    """
    eta, weight = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - np.sqrt(4 * NU * t[..., None]) * eta
    power = -np.cos(np.pi * y) / (2 * np.pi * NU)
    w = weight * np.exp(power - power.max(-1, keepdims=True))
    return -(np.sin(np.pi * y) * w).sum(-1) / w.sum(-1)


def burgers_truth() -> tuple[Tensor, Tensor]:
    x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0, 1, 26), indexing="ij")
    inputs = np.stack([x.ravel(), t.ravel()], 1)
    return torch.from_numpy(inputs).float(), torch.from_numpy(cole_hopf(x.ravel(), t.ravel())).float()


PROBLEMS = {
    "poisson": Problem(
        title="Poisson, inverse: relative L2 error of the diffusion coefficient",
        outputs=2,
        layers=(30,) * 3,
        n=1,
        rate=8e-4,
        weights=(1.0, 10.0, 10.0),
        iterations=4000,
        data=poisson_data,
        points=lambda generator: torch.rand(200, 2, generator=generator),
        residual=poisson_residual,
        truth=poisson_truth,
        judged=1,
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
        data=burgers_data,
        points=burgers_points,
        residual=burgers_residual,
        truth=burgers_truth,
        judged=0,
        level=0.2,
        paper={"fixed": 14750, "global": 13600, "layer": 11090, "neuron": 11170},
    ),
}


class Trainee(nn.Module):
    """A network and its slope recovery term, in one forward that ``functional_call`` can reach."""

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
        # the paper's global slope is of an earlier paper, which has no slope recovery
        self.recovers = kind in ("layer", "neuron")

    def forward(self, points: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        recovery = slope_recovery(self.network) if self.recovers else points.new_zeros(())
        return self.network(points), self.network(inputs), recovery


def train(
    problem: Problem, kind: str, seeds: int, iterations: int
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Errors (seeds × evaluations) and the weights in the end, stacked over the seeds."""
    trainees = [Trainee(problem, kind, seed) for seed in range(seeds)]
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    inputs, targets = (torch.stack(part) for part in zip(*map(problem.data, generators), strict=True))
    known = ~targets.isnan()
    grid, truth = problem.truth()
    parameters, _ = stack_module_state(trainees)
    forward = torch.vmap(lambda own, *args: functional_call(trainees[0], own, args))
    optimizer = torch.optim.Adam(parameters.values(), lr=problem.rate)
    of_residual, of_data, of_slopes = problem.weights
    errors: list[list[float]] = [[] for _ in range(seeds)]
    for iteration in range(1, iterations + 1):
        points = torch.stack([problem.points(generator) for generator in generators]).requires_grad_()
        y, fit, recovery = forward(parameters, points, inputs)
        loss = of_residual * problem.residual(points, y).square().mean()
        loss = loss + of_data * (fit - targets)[known].square().mean() + of_slopes * recovery.mean()
        optimizer.zero_grad()
        (seeds * loss).backward()  # a sum over the seeds: each one's gradient is its own
        optimizer.step()
        if iteration % EVERY == 0:
            with torch.no_grad():
                same = grid.expand(seeds, -1, -1)
                judged = forward(parameters, same, same[:, :1])[0][..., problem.judged]
            for own, off in zip(errors, (judged - truth).norm(dim=1) / truth.norm(), strict=True):
                own.append(off.item())
    return errors, {name: value.detach() for name, value in parameters.items()}


def slopes(problem: Problem, parameters: dict[str, Tensor]) -> list[list[float]]:
    """Each layer's n · slope (the mean over neurons), seed by seed."""
    means = [
        problem.n * value.reshape(len(value), -1).mean(1)
        for name, value in parameters.items()
        if name.endswith("slope")
    ]
    return torch.stack(means, 1).tolist() if means else []


def row(problem: Problem, kind: str, seeds: int, iterations: int) -> dict[str, Any]:
    """What one kind of network reached: late errors and all, and its slopes."""
    start = time.process_time()
    errors, parameters = train(problem, kind, seeds, iterations)
    final = [statistics.median(own[-10:]) for own in errors]  # single ones jump
    return {
        "name": KINDS[kind],
        "final_error": final,
        "median": statistics.median(final),
        "iterations_to_level": [
            next((EVERY * (i + 1) for i, e in enumerate(own) if e < problem.level), None) for own in errors
        ],
        "slopes": slopes(problem, parameters),
        "errors": [[float(f"{e:.4g}") for e in own] for own in errors],
        "cpu_seconds": round(time.process_time() - start, 1),
        "paper": problem.paper.get(kind),
    }


def picture(result: dict[str, Any], path: Path) -> None:
    """Errors against iterations: the median of the seeds, and their range."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result["problems"]), figsize=(10, 3.8))
    for axis, problem in zip(axes, result["problems"].values(), strict=True):
        for one in problem["kinds"].values():
            errors = np.array(one["errors"])
            steps = EVERY * np.arange(1, errors.shape[1] + 1)
            axis.plot(steps, np.median(errors, 0), label=one["name"])
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
        "--kind", action="append", choices=list(KINDS), help="default: all; others stay as they are"
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
            rows[kind] = one = row(problem, kind, SEEDS, problem.iterations)
            errors = ", ".join(f"{error:.4f}" for error in one["final_error"])
            print(
                f"{name:8} {one['name']:22} errors {errors}; below {problem.level} after "
                f"{one['iterations_to_level']}; {one['cpu_seconds']} s of CPU; the paper's {one['paper']}",
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
    picture(result, here.with_suffix(".svg"))


if __name__ == "__main__":
    main()
