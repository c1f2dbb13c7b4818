"""The noisy quadratic: the only workload whose solution is known exactly."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from plywise.arena.task import REGRESSION
from plywise.arena.workload import Workload
from plywise.data.digits import Split
from plywise.data.parts import Data

DIMENSIONS = 100
NOISE = 0.5
"""Standard deviation of the noise on training targets; its square is the least training loss."""
SAMPLES = 40_000
GRID = 2.0**-16
"""Data are rounded to multiples of this, which float32 holds exactly. The last digits of a product depend on
the machine, and a bench needs the same data on all machines."""


def spectrum() -> Tensor:
    """Eigenvalues of the inputs' covariance (100,): 90 % below 0.2, 10 % from 6 to 12, mean 1.

    As found in the curvature of deep networks: a few large ones, and a bulk near zero.
    """
    bulk = (torch.arange(90, dtype=torch.float64) + 0.5) / 90
    return torch.cat([bulk, torch.linspace(30, 60, 10, dtype=torch.float64)]) / 4.95


def make_data() -> Data:
    """Linear regression whose loss is the quadratic of `spectrum`, in directions that no axis is.

    Training samples are random and their targets noisy. Validation and test have no noise, and inputs whose
    second moments are exactly the covariance: the mean squared error on them *is* the expected loss above the
    noise, without any error of sampling.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rotation() -> Tensor:
        return torch.linalg.qr(normal(DIMENSIONS, DIMENSIONS)).Q

    root = spectrum().sqrt().diag() @ rotation()
    answer = normal(DIMENSIONS, 1)
    train = normal(SAMPLES, DIMENSIONS) @ root
    noise = NOISE * normal(SAMPLES, 1)
    exact = [DIMENSIONS**0.5 * rotation() @ root for _ in range(2)]
    return Data(
        Split(round_to_grid(train), round_to_grid(train @ answer + noise)),
        *(Split(round_to_grid(x), round_to_grid(x @ answer)) for x in exact),
    )


def round_to_grid(values: Tensor) -> Tensor:
    """Round to multiples of `GRID`."""
    return ((values / GRID).round() * GRID).float()


def make_model() -> nn.Module:
    """Return one linear layer, no bias: its 100 weights are the quadratic's variables."""
    return nn.Linear(DIMENSIONS, 1, bias=False)


WORKLOADS = (
    Workload(
        "quadratic",
        "A noisy quadratic of 100 variables with the spectrum of a deep network, as linear regression on "
        "40,000 samples, each seen once: conditioning and noise, judged by the exact expected loss.",
        make_model,
        make_data,
        replace(REGRESSION, metric_name="expected loss above the noise"),
        batch_size=100,
        steps=400,
    ),
)
