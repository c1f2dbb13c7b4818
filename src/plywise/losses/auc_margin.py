"""AUCMargin: maximise the area under the ROC curve by batches, for rare classes."""

import math

import torch
from torch import Tensor, nn

from plywise._util.checks import require_positive


class AUCMargin(nn.Module):
    """The AUC margin loss: a min-max form of a loss over all pairs of a positive and a negative sample.

    Idea: the AUC is the share of pairs that are in the right order. The square loss over all pairs depends on
        the scores only by the two classes' means and spreads, so two numbers that follow the means and one
        dual number that ascends make it a mean over samples, which batches estimate. Keeping the dual number
        from falling below 0 makes it a hinge: class means that are a margin apart are not pushed further.
    Equation: F = E₊(h−a)² + E₋(h−b)² + 2α(margin + E₋h − E₊h) − α², min over the weights, a and b, max over
        α ≥ floor. At the saddle a = E₊h, b = E₋h, α = max(floor, margin + b − a), and F − with floor = −∞ and
        by value and gradient − is the mean over all pairs of (margin − (h₊ − h₋))².
    Use when: the order of the scores is what counts, and one of two classes is rare.
    Do not use when: scores are to be probabilities (they are not), or what counts is a threshold.
    Layers: any network with one score a sample; scores are not squashed here.
    Cost: a few passes over a batch of scores; it reads two numbers off the device, to check the labels.
    Status: variant. The paper's F, "v1" in its code, is p(1−p) times this one, p the share of positives: the
        same saddle. That code's "v2" has this scale too, but a misplaced parenthesis scales E₋h by 1−p,
        and its means are too large where a score equals a, NaN where all of a class do: not so here. Its
        optimizer PESG is SGD, gradients clipped to ±1, and a `plywise.optim.ProximalAnchor`.
    Source: Yuan, Yan, Sonka, Yang, "Large-scale Robust Deep AUC Maximization: A New Surrogate Loss and
        Empirical Studies on Medical Image Classification", ICCV 2021, arXiv 2012.03173; the min-max form:
        Ying, Wen, Lyu, "Stochastic Online AUC Maximization", NeurIPS 2016.
    Code: Optimization-AI/LibAUC
    Results: the paper's are not reproduced here: its data (CheXpert, melanoma images) are not at hand.
        On digits with 20 eights to learn from (examples/plot_auc_margin.py, six seeds) its mean AUC is 0.970
        and cross-entropy's 0.967, which is less than seeds differ. In the arena (digits-rare, tuned, median
        of three seeds) 1 - AUC is 0.031, cross-entropy's 0.028 on SGD, 0.017 with AdamW and 0.007 with Muon.
    Limits: two classes. ``loss.alpha.grad`` is minus the derivative of F by α, so that every optimizer that
        descends makes α ascend: give it ``loss.parameters()`` in an ordinary group, without ``maximize``. α
        is moved up to the floor where it is used next, in `forward`. The value of F is no measure of
        progress: α ascends it. Learning rates are smaller than cross-entropy's; too large a one ends with
        scores that are all alike.

    Args:
        margin: how far apart the class means shall be, in units of the scores. Default 1. Range 0.1 to 10.
        positive_share: the share p of positives among the data. A class's mean is then its sum over n·p or
            n·(1−p), and F's mean over random batches is F of the data, whatever is in each. With None each
            batch has its own class means, and needs both classes. Default None. Range 0.001 to 0.999.
        floor: the smallest α. −inf gives the pairwise square loss in place of the hinge. Default 0. Range -1
            to 0.

    Attributes:
        a: follows the mean score of positives, a 0-d parameter.
        b: follows that of negatives.
        alpha: the dual number.

    Raises:
        ValueError: ``margin`` is not positive, ``positive_share`` is not between 0 and 1, or ``floor`` is NaN
            or +inf.

    Example:
        >>> import torch
        >>> from plywise.losses import AUCMargin
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 3)
        >>> y = x[:, 0] > 1.3  # a rare class
        >>> model, loss = torch.nn.Linear(3, 1), AUCMargin()
        >>> optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        >>> bool(model(x[y]).min() > model(x[~y]).mean())
        True
    """

    def __init__(self, margin: float = 1.0, positive_share: float | None = None, floor: float = 0.0) -> None:
        super().__init__()
        require_positive(self, margin=margin)
        if positive_share is not None and not 0 < positive_share < 1:
            raise ValueError(f"AUCMargin: positive_share must be in (0, 1) or None, not {positive_share!r}.")
        if not floor < math.inf:  # NaN is not
            raise ValueError(f"AUCMargin: floor must be a number below infinity, not {floor!r}.")
        self.margin = margin
        self.positive_share = positive_share
        self.floor = floor
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, y: Tensor) -> Tensor:
        """F of a batch (0-d).

        Args:
            scores: (n,) or (n, 1), real.
            y: as many labels: booleans, or 0 and 1; 1 is positive.

        Raises:
            ValueError: shapes do not fit, labels are others, or a class is missing and ``positive_share`` is
                None.
        """
        scores, positive, counts = checked_batch(scores, y, self.a.dtype)
        of_positives, of_negatives = self._divisors(counts)
        # .data: a graph of this step's that is still to be run backward has seen this very value
        self.alpha.data.clamp_(min=self.floor)
        alpha = 2 * self.alpha.detach() - self.alpha  # the same value, the negative gradient: α ascends
        plus = positive.to(scores.dtype) / of_positives
        minus = (~positive).to(scores.dtype) / of_negatives
        spread = (plus * (scores - self.a).square() + minus * (scores - self.b).square()).sum()
        gap = ((minus - plus) * scores).sum()
        return spread + 2 * alpha * (self.margin + gap) - alpha.square()

    @torch.no_grad()
    def settle(self, scores: Tensor, y: Tensor) -> None:
        """Set a, b and α to the saddle's values for these scores: the class means, and their gap's shortfall.

        Worth a call before training goes on from a network that was trained with another loss.

        Raises:
            ValueError: shapes do not fit, labels are others, or a class is missing.
        """
        scores, positive, counts = checked_batch(scores, y, self.a.dtype)
        _require_both(counts)
        self.a.copy_(scores[positive].mean())
        self.b.copy_(scores[~positive].mean())
        self.alpha.copy_((self.margin + self.b - self.a).clamp(min=self.floor))

    def extra_repr(self) -> str:
        """The settings, as `print` shows them."""
        return f"margin={self.margin}, positive_share={self.positive_share}, floor={self.floor}"

    def _divisors(self, counts: tuple[int, int]) -> tuple[float, float]:
        """What the sums over positives and over negatives are divided by."""
        if self.positive_share is None:
            _require_both(counts)
            return counts
        return self.positive_share * sum(counts), (1 - self.positive_share) * sum(counts)


def _require_both(counts: tuple[int, int]) -> None:
    if 0 in counts:
        raise ValueError(
            f"AUCMargin: {counts[0]} of {sum(counts)} samples are positive, so a class has no mean score. "
            "Give positive_share=, the share of positives among the data, or draw batches with both classes."
        )


def checked_batch(scores: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Scores (n,) of at least the precision of ``dtype``, which are positive, and how many of each class.

    Raises:
        ValueError: shapes do not fit, there is no sample, or labels are neither booleans nor 0 and 1.
    """
    shapes = ((y.numel(),), (y.numel(), 1))
    if scores.shape not in shapes or y.shape not in shapes or not y.numel():
        raise ValueError(
            "AUCMargin needs a score and a label for each sample, both (n,) or (n, 1), not "
            f"{tuple(scores.shape)} and {tuple(y.shape)}."
        )
    y = y.reshape(-1)
    positives, negatives = torch.stack([(y == 1).sum(), (y == 0).sum()]).tolist()
    if positives + negatives < len(y):
        raise ValueError(
            f"AUCMargin: {len(y) - positives - negatives} of {len(y)} labels are neither 0 nor 1. Positives "
            "are 1 (or True), negatives 0; write y > 0 for labels -1 and 1."
        )
    wide = torch.promote_types(scores.dtype, dtype)
    return scores.reshape(-1).to(wide), y == 1, (positives, negatives)
