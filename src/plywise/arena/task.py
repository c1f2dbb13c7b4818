"""The task of a network: a loss to train by, and a metric to compare by."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.data.batches import Batch, Part, clone_batch, count_samples
from plywise.errors import DataError

Judge = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets of some samples to their mean loss, a scalar."""


@dataclass(frozen=True)
class Task:
    """A loss and a metric, both means over samples, both better when lower.

    Attributes:
        loss: the training loss.
        metric: the metric of validation and test.
        metric_name: its name in reports.
        chance: the metric at chance, where it is known; pictures show it as a line.
        losses: the loss of each sample (N,), for methods that need them apart; None where it has none.
    """

    loss: Judge
    metric: Judge
    metric_name: str
    chance: float | None = None
    losses: Judge | None = None

    def measure(self, predict: Callable[[Batch], Tensor], part: Part, batch: int) -> float:
        """Return the metric over a set, which the network sees batch by batch."""
        return mean(self.metric, predict, part, batch)


class WholeSetTask(Task):
    """A task whose metric is not a mean over samples: it is computed from the outputs of the whole set."""

    def measure(self, predict: Callable[[Batch], Tensor], part: Part, batch: int) -> float:
        """Return the metric over a set, which the network sees batch by batch."""
        with torch.no_grad():
            pairs = [(predict(clone_batch(x)), y) for x, y in part.chunks(batch)]
        outputs, targets = (torch.cat(values) for values in zip(*pairs, strict=True))
        return float(self.metric(outputs, targets.to(outputs.device)))


def error_rate(output: Tensor, y: Tensor) -> Tensor:
    """Share of samples whose largest score is not that of their class."""
    return (output.argmax(1) != y).float().mean()


def token_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Nats a token; scores (B, T, classes), tokens (B, T)."""
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def squared_errors(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (N,)."""
    return (output - y).square().flatten(1).mean(1)


def wrong_order(scores: Tensor, y: Tensor) -> Tensor:
    """Return the share of pairs of a positive and a negative sample in the wrong order: 1 - AUC.

    Equal scores count as half. As a metric of your own: ``--metric plywise.arena.task:wrong_order``.

    Args:
        scores: one a sample, (N,) or (N, 1).
        y: as many labels, 1 is positive.

    Raises:
        PlywiseError: a class is missing.

    Example:
        >>> wrong_order(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 1, 0, 1]))
        tensor(0.1250)
    """
    scores, positive = scores.flatten(), y.flatten() == 1
    above = scores[positive].contiguous()
    below = scores[~positive].sort().values
    if not (len(above) and len(below)):
        raise DataError(f"{len(above)} of {len(scores)} samples are positive: there is no pair to order.")
    smaller, not_larger = (torch.searchsorted(below, above, right=right) for right in (False, True))
    return 1 - (smaller + not_larger).to(scores.dtype).mean() / (2 * len(below))


CLASSIFICATION = Task(
    F.cross_entropy, error_rate, "error rate", losses=partial(F.cross_entropy, reduction="none")
)
REGRESSION = Task(F.mse_loss, F.mse_loss, "mean squared error", losses=squared_errors)
SEQUENCES = Task(token_cross_entropy, token_cross_entropy, "nats a token")
RANKING = WholeSetTask(
    F.binary_cross_entropy_with_logits, wrong_order, "share of pairs in the wrong order", chance=0.5
)
WHOLE_SET = (wrong_order,)
"""Metrics that are not means over samples."""


def step_loss(output: Tensor, y: Batch) -> Tensor:
    """Return the loss that a `plywise.data.models.StepModel` gives."""
    return output.reshape(-1)[0]


def step_metric(output: Tensor, y: Batch) -> Tensor:
    """Return the metric that a `plywise.data.models.StepModel` gives in eval mode."""
    return output.reshape(-1)[-1]


def choose_task(y: Tensor) -> Task:
    """Return the usual task for targets: class indices, tokens, or numbers.

    Raises:
        PlywiseError: they are none of these.

    Example:
        >>> choose_task(torch.tensor([0, 2, 1])).metric_name
        'error rate'
    """
    if y.is_floating_point():
        return REGRESSION
    if y.dtype == torch.long and y.dim() in (1, 2):
        return CLASSIFICATION if y.dim() == 1 else SEQUENCES
    raise DataError(
        f"No loss is known for targets of {y.dtype} and shape {tuple(y.shape)}: they are class indices (N,), "
        "tokens (N, T), both torch.long, or floating-point numbers. Name a loss and a metric of your own."
    )


@torch.no_grad()
def mean(judge: Judge, predict: Callable[[Batch], Tensor], part: Part, batch: int = 250) -> float:
    """Mean of a loss or metric over a set, batch by batch, whatever the network does to its input."""
    total = sum(float(judge(predict(clone_batch(x)), y)) * count_samples(x) for x, y in part.chunks(batch))
    return total / len(part)


def predictor(model: nn.Module) -> Callable[[Batch], Tensor]:
    """Return a model's outputs in eval mode; every part of it is in its own mode again afterwards."""

    def predict(x: Batch) -> Tensor:
        with evaluating(model):
            output: Tensor = model(x)
        return output

    return predict
