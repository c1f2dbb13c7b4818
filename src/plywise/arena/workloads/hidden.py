"""Workloads made by a seed, to test choices that were made on others: no default may be tuned on them.

A default that is chosen by a bench fits the workloads of that bench. A new seed makes workloads that nobody
has seen: other networks, data, sizes and labels of the same kinds. Everything follows from kind and seed, so
that the name is enough to make the same workload on another machine. Targets come from the baselines of the
same bench.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from plywise._util.seeded import make_seed
from plywise.arena.task import CLASSIFICATION, REGRESSION, Task
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import conv_net, mlp
from plywise.arena.workloads.synthetic import round_to_grid
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data

SIZES = (3000, 500, 500)
"""Samples to train on, to validate and to test."""
CHOICE = TypeVar("CHOICE")


class Draws:
    """Random numbers that follow from a kind of workload and a seed.

    Example:
        >>> Draws("teacher", 7).choice("a", "b", "c") == Draws("teacher", 7).choice("a", "b", "c")
        True
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(make_seed(f"{kind} {seed}", 7))

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers between two others in float64."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from ``low`` to ``high``, both possible."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def choice(self, *values: CHOICE) -> CHOICE:
        """Return one of some values."""
        return values[int(self.whole(0, len(values) - 1))]

    def order(self, count: int) -> Tensor:
        """Return a permutation."""
        return torch.randperm(count, generator=self.generator)

    def network(self, x: Tensor, hidden: int, outputs: int) -> Tensor:
        """Return the output of a random network of tanh layers, which is far from linear."""
        for _ in range(hidden):
            width = int(self.whole(8, 24))
            gain = float(self.uniform(1.0, 2.0)) / x.shape[1] ** 0.5
            x = torch.tanh(gain * x @ self.normal(x.shape[1], width))
        return x @ self.normal(x.shape[1], outputs)


# ---- numbers ---------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def teacher(seed: int) -> Data:
    """Make correlated inputs and the outputs of a random network, with noise on the training targets."""
    draws = Draws("teacher", seed)
    inputs, outputs = int(draws.whole(10, 30)), int(draws.whole(1, 4))
    x = _correlate(draws, inputs)
    y = draws.network(_standardise(x), int(draws.whole(1, 2)), outputs)
    noise = float(draws.uniform(0.0, 0.3)) * draws.normal(SIZES[0], outputs)
    y = _standardise(y)
    y[: SIZES[0]] += noise
    return _cut(_standardise(x), y)


@lru_cache(maxsize=8)
def regression_table(seed: int) -> Data:
    """A table whose target hangs on hidden factors; outliers among inputs and among training targets."""
    draws = Draws("regression", seed)
    x, factors = _make_table(draws)
    y = _standardise(draws.network(factors, 1, 1))
    y += float(draws.uniform(0.1, 0.4)) * draws.normal(*y.shape)
    wrong = draws.uniform(0, 1, *y.shape) < 0.02
    wrong[SIZES[0] :] = False
    return _cut(x, torch.where(wrong, 5 * draws.normal(*y.shape), y))


@lru_cache(maxsize=8)
def class_table(seed: int) -> Data:
    """Return a table with outliers whose rows are of three to seven classes, some of them rare."""
    draws = Draws("classes", seed)
    x, factors = _make_table(draws)
    classes = int(draws.whole(3, 7))
    scores = 2 * _standardise(draws.network(factors, 1, classes)) + draws.normal(classes) / 2
    gumbel = -torch.log(-torch.log(draws.uniform(1e-9, 1 - 1e-9, *scores.shape)))
    return _cut(x, (scores + float(draws.uniform(0.1, 0.5)) * gumbel).argmax(1))


def _correlate(draws: Draws, columns: int) -> Tensor:
    """Rows whose covariance has a spectrum that falls by a power, in directions that no axis is."""
    falling = torch.arange(1.0, columns + 1, dtype=torch.float64) ** -float(draws.uniform(0.5, 1.5))
    return draws.normal(sum(SIZES), columns) * falling @ torch.linalg.qr(draws.normal(columns, columns)).Q


def _make_table(draws: Draws) -> tuple[Tensor, Tensor]:
    """Standardised columns of unlike kinds with outliers, and the fewer factors that they depend on."""
    columns = int(draws.whole(8, 24))
    factors = draws.normal(sum(SIZES), max(3, columns // 3))
    x = factors @ draws.normal(factors.shape[1], columns) / factors.shape[1] ** 0.5
    x = x + 0.2 * draws.normal(*x.shape)
    kinds = draws.whole(0, 2, columns)
    x = torch.where(kinds == 1, torch.exp(x), torch.where(kinds == 2, x.round(), x))
    far = draws.uniform(0, 1, *x.shape) < float(draws.uniform(0.005, 0.02))
    return _standardise(torch.where(far, x * draws.uniform(4, 10, *x.shape), x)), factors


def _standardise(values: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1 over the training rows."""
    deviation, mean = torch.std_mean(values[: SIZES[0]], dim=0)
    return (values - mean) / torch.where(deviation > 0, deviation, 1.0)


def _cut(x: Tensor, y: Tensor) -> Data:
    x, y = round_to_grid(x), round_to_grid(y) if y.is_floating_point() else y
    return Data(*(Split(*part) for part in zip(x.split(SIZES), y.split(SIZES), strict=True)))


# ---- images ----------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def grouped_digits(seed: int) -> Data:
    """The shipped digits, drawn into other parts; their labels are groups of digits, as odd and even are."""
    draws = Draws("groups", seed)
    groups, shuffled = int(draws.whole(2, 5)), draws.choice(True, False)
    group_of = torch.cat([torch.arange(groups), draws.whole(0, groups - 1, 10 - groups)])[draws.order(10)]
    order = draws.order(64) if shuffled else torch.arange(64)
    parts = load_digits(int(draws.whole(1, 2**31)))
    rows = [Split(part.x[:, order], group_of[part.y]) for part in parts]
    return Data(*(Split(part.x if shuffled else part.x.view(-1, 1, 8, 8), part.y) for part in rows))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "difference": lambda a, b: (a - b).abs(),
    "larger one": torch.maximum,
}
"""The possible labels of two digits."""


@lru_cache(maxsize=8)
def paired_digits(seed: int) -> Data:
    """Two digits side by side, (1, 8, 16); the label is their sum, their difference, or the larger one."""
    draws = Draws("pairs", seed)
    operation = OPERATIONS[draws.choice(*OPERATIONS)]
    parts = []
    for part, count in zip(load_digits(int(draws.whole(1, 2**31))), SIZES, strict=True):
        first, second = draws.whole(0, len(part.x) - 1, 2, count)
        images = [part.x[rows].view(-1, 1, 8, 8) for rows in (first, second)]
        parts.append(Split(torch.cat(images, dim=3), operation(part.y[first], part.y[second])))
    return Data(*parts)


# ---- as workloads ----------------------------------------------------------------------------------


def make_workload(kind: str, seed: int) -> Workload:
    """Return a workload whose network, length and batches follow from the seed, as its data do.

    Args:
        kind: one of ``KINDS``.
        seed: 0 or more.

    Example:
        >>> make_workload("teacher", 7).name
        'hidden-teacher-7'
    """
    about, make_data = KINDS[kind]
    draws, data = Draws(f"{kind} run", seed), make_data(seed)
    y = data.train.y
    classes = 0 if y.is_floating_point() else 1 + max(int(part.y.max()) for part in data.parts)
    return Workload(
        f"hidden-{kind}-{seed}",
        about,
        _make_network(draws, data.train.x.shape[1:], classes or y.shape[1]),
        partial(make_data, seed),
        _make_classification(data) if classes else replace(REGRESSION, chance=1.0),
        batch_size=draws.choice(32, 64, 128),
        steps=draws.choice(200, 250, 300),
        blocks=3 if classes else 0,
        classes=classes,
    )


def _make_classification(data: Data) -> Task:
    """Make the task; at chance, the most frequent class is always predicted."""
    most = int(data.train.y.bincount().argmax())
    return replace(CLASSIFICATION, chance=round(float((data.validation.y != most).float().mean()), 4))


def _make_network(draws: Draws, shape: torch.Size, outputs: int) -> Callable[[], nn.Module]:
    if len(shape) == 3:
        image = (shape[0], shape[1], shape[2])
        channels, dense = draws.choice((8, 16), (16, 32)), draws.choice(32, 64)
        return partial(conv_net, image, channels, (dense, outputs))
    widths = [draws.choice(48, 64, 96)] * draws.choice(2, 3)
    activation = draws.choice(nn.ReLU, nn.Tanh, nn.GELU)
    return partial(mlp, *shape, *widths, outputs, activation=activation)


KINDS: dict[str, tuple[str, Callable[[int], Data]]] = {
    "teacher": ("What a random network says of correlated inputs; noise on the training targets.", teacher),
    "regression": (
        "A random table with outliers and correlated inputs; a number to predict.",
        regression_table,
    ),
    "classes": (
        "A random table with outliers and correlated inputs; classes, some of them rare.",
        class_table,
    ),
    "groups": (
        "The shipped digits in random groups, as odd and even; perhaps pixels in disorder.",
        grouped_digits,
    ),
    "pairs": ("Two of the shipped digits: their sum, their difference, or the larger one.", paired_digits),
}
"""The description of each kind, and the function that makes its data from a seed."""
