"""Regression on tables: inputs on very different scales, brought to one by the training part alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plywise.arena.task import REGRESSION
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import mlp
from plywise.data.digits import Split
from plywise.data.parts import Data, cut_tenths_of_kinds
from plywise.data.sets import load_boiling_points, load_numeric_table

Numbers = NDArray[np.float64]

SHARE = replace(REGRESSION, metric_name="mean squared error, in variances of the target", chance=1.0)
"""Targets have variance 1 over the training part, so that the error of their mean is about 1."""


def prepare_table(read: Callable[[], tuple[Numbers, Numbers]]) -> Data:
    """8, 1 and 1 tenth of the rows; rows with the same inputs stay together.

    Inputs and target have mean 0 and variance 1 over the training part; a missing input is the training
    part's median. Validation and test have no say in either.

    Args:
        read: gives inputs (N, d), NaN where a value is missing, and targets (N,).
    """
    x, y = read()
    return _scale(cut_tenths_of_kinds(torch.from_numpy(x), torch.from_numpy(y).unsqueeze(1)))


def _scale(data: Data) -> Data:
    x, y = data.train.x, data.train.y
    median = x.nanmedian(dim=0).values
    (x_scale, x_mean), (y_scale, y_mean) = _compute_moments(_fill_missing(x, median)), _compute_moments(y)

    def scaled(part: Split) -> Split:
        inputs = (_fill_missing(part.x, median) - x_mean) / x_scale
        return Split(inputs.float(), ((part.y - y_mean) / y_scale).float())

    return Data(*(scaled(part) for part in data.parts))


def _fill_missing(x: Tensor, median: Tensor) -> Tensor:
    return torch.where(x.isnan(), median, x)


def _compute_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each column; 1 for the deviation of one that is constant."""
    deviation, mean = torch.std_mean(values, dim=0)
    return torch.where(deviation > 0, deviation, 1.0), mean


def _make_workload(
    name: str, about: str, columns: int, read: Callable[[], tuple[Numbers, Numbers]], steps: int = 400
) -> Workload:
    return Workload(
        name,
        f"{about} {columns}-64-64-1 with ReLU; inputs and target standardised by the training part.",
        partial(mlp, columns, 64, 64, 1),
        partial(prepare_table, read),
        SHARE,
        batch_size=64,
        steps=steps,
    )


WORKLOADS = (
    _make_workload(
        "concrete",
        "Strength of concrete by what it is mixed of and its age, 1,030 mixtures (UCI).",
        8,
        partial(load_numeric_table, "uci_concrete"),
    ),
    _make_workload(
        "energy",
        "Heating load of 768 simulated buildings by their shape (UCI): few rows, inputs that depend on "
        "each other.",
        8,
        partial(load_numeric_table, "uci_energy"),
    ),
    _make_workload(
        "california",
        "House values in 20,640 districts of California, census of 1990: heavy tails; 207 missing values "
        "are the training part's median.",
        13,
        partial(load_numeric_table, "california_housing"),
        steps=600,
    ),
    _make_workload(
        "boiling-points",
        "Boiling points of 1,496 organic compounds by what their formulas hold: sparse counts beside a "
        "mass; compounds that read alike stay in one part.",
        20,
        load_boiling_points,
    ),
)
