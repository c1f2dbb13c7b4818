"""The parts of a reproduction: a paper, its experiments, their numbers, and the sizes at which they run."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plywise._util.suggest import suggestion
from plywise.arena.method import Trainer
from plywise.data.parts import Data
from plywise.errors import BenchError

FULL, MIDDLE, SMALL, DIGITS = "full", "middle", "small", "digits"
"""The sizes: as in the paper; half an hour of a core; minutes on two cores; a minute on bundled digits."""
SIZE_WORDS = {
    FULL: "full size",
    MIDDLE: "middle size",
    SMALL: "small size",
    DIGITS: "the size of the bundled digits",
}

DIVERGED = math.nan
"""The paper's number where its run diverged."""

Line = Mapping[str, Any]
"""A run as the ledger keeps it."""


@dataclass(frozen=True)
class Measure:
    """The measure by which an experiment compares methods.

    Attributes:
        name: its name.
        unit: its unit.
        read: its value in a run that did not fail.
        scale: where its values are averaged and compared: losses as logarithms.
        back: from there to values again.
        better: 1 where the higher is the better, -1 where the lower is.
        tuned_by: what rates are chosen by, the lower the better; never the test data.
    """

    name: str
    unit: str
    read: Callable[[Line], float]
    scale: Callable[[float], float]
    back: Callable[[float], float]
    better: int
    tuned_by: Callable[[Line], float]


TRAINING_LOSS = Measure(
    "training loss at the end",
    "nats",
    read=lambda line: float(line["loss"][-1]),
    scale=lambda loss: math.log(max(loss, 1e-12)),
    back=math.exp,
    better=-1,
    tuned_by=lambda line: float(line["loss"][-1]),
)
"""Cross entropy over the whole training set; its mean is the geometric one."""
TEST_ACCURACY = Measure(
    "test accuracy at the end",
    "%",
    read=lambda line: 100 * (1 - float(line["test"])),
    scale=lambda accuracy: accuracy,
    back=lambda accuracy: accuracy,
    better=1,
    tuned_by=lambda line: float(line["validation"][-1]),
)


@dataclass(frozen=True)
class ExperimentSize:
    """How large an experiment is run.

    Attributes:
        about: network and data in words; for the small size what was cut.
        source: reads the data, from the numbers of images of the three sets.
        widths: of the network; each experiment says what they are.
        batch: images a batch.
        epochs: passes over the training set.
        images: images of the training set.
        validation: images held out of it.
        test: images of the test set.
        faster: factor on every rate, where a short training needs it.
    """

    about: str
    source: Callable[[int, int, int], Data]
    widths: tuple[int, ...]
    batch: int
    epochs: int
    images: int
    validation: int = 5_000
    test: int = 10_000
    faster: float = 1.0

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.epochs * (self.images // self.batch)

    def data(self) -> Data:
        """Return the data.

        Raises:
            PlywiseError: a file is missing.
        """
        return self.source(self.images, self.validation, self.test)


@dataclass(frozen=True)
class Start:
    """What an arm gets when a run starts.

    Attributes:
        size: the size.
        rate: the learning rate.
        example: a few training images.
        device: where the network shall be.
    """

    size: ExperimentSize
    rate: float
    example: Tensor
    device: str = "cpu"


@dataclass(frozen=True)
class Arm:
    """One way to train in an experiment: a row, or a cell, of the paper's table.

    Attributes:
        method: the method; arms of one method cost the same.
        begin: makes the network and begins to train it; called with the seed set.
        rates: learning rates to choose from with a seed of its own; one: the paper's.
        number: the paper's number; `DIVERGED` if its run did; None if none is known.
        at: what tells it from other arms of its method, as ``"τ = 1"``.
        sizes: the sizes that it is run at.
    """

    method: str
    begin: Callable[[Start], Trainer]
    rates: tuple[float, ...]
    number: float | None = None
    at: str = ""
    sizes: tuple[str, ...] = (FULL, SMALL)

    @property
    def name(self) -> str:
        """The method, and what distinguishes it from other arms of this method."""
        return f"{self.method}, {self.at}" if self.at else self.method


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about two arms: one is better than the other, or about as good.

    Attributes:
        better: name of the one.
        worse: name of the other.
        within: "about as good" means within so much of the measure; None: better.
    """

    better: str
    worse: str
    within: float | None = None

    def __str__(self) -> str:
        if self.within is None:
            return f"{self.better} beats {self.worse}"
        return f"{self.better} is within {self.within:g} of {self.worse}"


@dataclass(frozen=True)
class Experiment:
    """An experiment of a paper.

    Attributes:
        name: its name.
        about: one line.
        where: where in the paper it is, and how we know its numbers.
        measure: what it is judged by.
        arms: what is compared.
        sizes: `FULL` and `SMALL`; `MIDDLE` where there is one; and `DIGITS` where a claim shows on 1,100
            digits of 8×8 pixels.
        claims: what the paper says of its arms, beyond single numbers.
        differences: why our numbers may differ from the paper's.
    """

    name: str
    about: str
    where: str
    measure: Measure
    arms: tuple[Arm, ...]
    sizes: Mapping[str, ExperimentSize]
    claims: tuple[Claim, ...] = ()
    differences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_plain(self.name, "experiment")
        names = [arm.name for arm in self.arms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BenchError(f"{self.name}: two arms are called {twice!r}.")
        if idle := next((arm.name for arm in self.arms if not arm.rates), None):
            raise BenchError(f"{self.name}: {idle} has no rate.")
        claimed = [name for claim in self.claims for name in (claim.better, claim.worse)]
        if unknown := next((name for name in claimed if name not in names), None):
            raise BenchError(
                f"{self.name}: a claim is about {unknown!r}, which is not an arm. "
                f"{suggestion(unknown, tuple(names))}There are: {', '.join(names)}."
            )

    def arms_at(self, size: str) -> list[Arm]:
        """Return the arms that are run at a size."""
        return [arm for arm in self.arms if size in arm.sizes]

    def claims_at(self, size: str) -> list[Claim]:
        """Return the claims about these arms."""
        names = {arm.name for arm in self.arms_at(size)}
        return [claim for claim in self.claims if {claim.better, claim.worse} <= names]


def _require_plain(name: str, what: str) -> None:
    """Names are part of a folder's name and of the ledger's keys."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise BenchError(
            f"The name of a{'n' if what[0] in 'aeiou' else ''} {what} has letters, digits, '-', '_' and '.', "
            f"unlike {name!r}."
        )


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        name: its name on the command line.
        title: authors, title, where it appeared.
        experiments: its experiments.
    """

    name: str
    title: str
    experiments: tuple[Experiment, ...]

    def __post_init__(self) -> None:
        _require_plain(self.name, "paper")
        if not self.experiments:
            raise BenchError(f"Paper {self.name} has no experiment.")

    def find(self, name: str) -> Experiment:
        """Return the experiment called ``name``.

        Raises:
            PlywiseError: there is none.
        """
        found = {experiment.name: experiment for experiment in self.experiments}
        if name not in found:
            raise BenchError(
                f"{self.name} has no experiment called {name!r}. {suggestion(name, tuple(found))}There are: "
                f"{', '.join(found)}."
            )
        return found[name]
