"""AUCMargin: maximise the area under the ROC curve in mini-batches, for rare classes."""

import math

import torch
from torch import Tensor, nn

from plywise._util.checks import is_number, require_kind, require_positive


class AUCMargin(nn.Module):
    """The AUC margin loss: a loss over all pairs of a positive and a negative sample, in min-max form.

    Idea: the AUC is the share of pairs that are in the right order. The square loss over all pairs depends on
        the scores only through the mean and the variance of each class. With two variables that follow the
        means and one dual variable that is maximised, it becomes a mean over samples, which batches can
        estimate. A lower bound of 0 on the dual variable makes it a hinge loss: class means that are a margin
        apart are not pushed further apart.
    Equation: F = E₊(h−a)² + E₋(h−b)² + 2α(margin + E₋h − E₊h) − α², min over the weights, a and b, max over
        α ≥ floor. At the saddle a = E₊h, b = E₋h, α = max(floor, margin + b − a), and F − with floor = −∞ and
        by value and gradient − is the mean over all pairs of (margin − (h₊ − h₋))².
    Use when: the order of the scores is what counts, and one of two classes is rare.
    Do not use when: you need probabilities (these scores are none), or the decision at one threshold counts.
    Layers: any network with one score a sample; scores are not squashed here.
    Cost: a few passes over a batch of scores. It reads two numbers from the device, to check the labels.
    Status: variant. The paper's F ("v1" in its code) is this F times p(1−p), where p is the share of
        positives; the saddle point is the same. "v2" in that code has the scale used here, but a misplaced
        parenthesis scales E₋h by 1−p, and its means are too large where a score equals a, and NaN if all
        scores of a class do. Both are corrected here. The paper's optimizer PESG is SGD with gradients
        clipped to ±1 and a `plywise.optim.ProximalAnchor`.
    Source: Yuan, Yan, Sonka, Yang, "Large-scale Robust Deep AUC Maximization: A New Surrogate Loss and
        Empirical Studies on Medical Image Classification", ICCV 2021, arXiv 2012.03173; the min-max form:
        Ying, Wen, Lyu, "Stochastic Online AUC Maximization", NeurIPS 2016.
    Code: Optimization-AI/LibAUC
    Results: the paper's results are not reproduced here, because its data (CheXpert, melanoma images) are not
        available to us. On digits with 20 eights in the training set (examples/plot_auc_margin.py, six seeds)
        the mean AUC is 0.970, and 0.967 with cross entropy; the difference is smaller than that between
        seeds. In the arena (digits-rare, tuned, median of three seeds) 1 - AUC is 0.031, cross-entropy's
        0.028 on SGD, 0.017 with AdamW and 0.007 with Muon.
    Limits: two classes. ``loss.alpha.grad`` is minus the derivative of F by α, so that an optimizer that
        minimises makes α ascend: give it ``loss.parameters()`` in an ordinary group, without ``maximize``.
        The next `forward` raises α to the floor if it is below. The value of F does not measure progress,
        because α maximises it. Use smaller learning rates than for cross entropy: with a rate that is too
        large all scores become equal.

    Args:
        margin: the wanted distance of the class means, in units of the scores. Default 1. Range 0.1 to 10.
        positive_share: the share p of positives among the data. The mean of a class in a batch of n is then
            its sum divided by n·p or n·(1−p), so that the mean of F over random batches is F of the data,
            also if a batch lacks a class. With None each batch has class means of its own and needs samples
            of both classes. Default None. Range 0.001 to 0.999.
        floor: the smallest α. −inf gives the pairwise square loss in place of the hinge. Default 0. Range -1
            to 0.

    Attributes:
        a: follows the mean score of positives; a 0-d parameter, as b and alpha are.
        b: follows the mean score of negatives.
        alpha: the dual variable.

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
        if positive_share is not None and not (is_number(positive_share) and 0 < positive_share < 1):
            raise ValueError(f"AUCMargin: positive_share must be in (0, 1) or None, not {positive_share!r}.")
        if not is_number(floor) or not floor < math.inf:  # false for NaN
            raise ValueError(f"AUCMargin: floor must be a number below infinity, not {floor!r}.")
        self.margin = margin
        self.positive_share = positive_share
        self.floor = floor
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, y: Tensor) -> Tensor:
        """Compute F of a batch, a 0-d tensor.

        Args:
            scores: (n,) or (n, 1), real.
            y: a label for each score: booleans, or 0 and 1; 1 is positive.

        Raises:
            ValueError: shapes do not fit, there are other labels, or a class is missing and
                ``positive_share`` is None.
        """
        scores, positive, counts = check_batch(scores, y, self.a.dtype)
        of_positives, of_negatives = self._compute_divisors(counts)
        # by .data: a graph of this step that has not run backward yet has saved this tensor
        self.alpha.data.clamp_(min=self.floor)
        alpha = 2 * self.alpha.detach() - self.alpha  # the same value, the negative gradient: α ascends
        plus = positive.to(scores.dtype) / of_positives
        minus = (~positive).to(scores.dtype) / of_negatives
        spread = (plus * (scores - self.a).square() + minus * (scores - self.b).square()).sum()
        gap = ((minus - plus) * scores).sum()
        return spread + 2 * alpha * (self.margin + gap) - alpha.square()

    @torch.no_grad()
    def settle(self, scores: Tensor, y: Tensor) -> None:
        """Set a, b and α to their values at the saddle point for these scores.

        a and b become the class means, and α what their distance lacks of the margin. Call it before you
        continue to train a network that was trained with another loss.

        Raises:
            ValueError: shapes do not fit, there are other labels, or a class is missing.
        """
        scores, positive, counts = check_batch(scores, y, self.a.dtype)
        _require_both(counts)
        self.a.copy_(scores[positive].mean())
        self.b.copy_(scores[~positive].mean())
        self.alpha.copy_((self.margin + self.b - self.a).clamp(min=self.floor))

    def extra_repr(self) -> str:
        """The settings, as `print` shows them."""
        return f"margin={self.margin}, positive_share={self.positive_share}, floor={self.floor}"

    def _compute_divisors(self, counts: tuple[int, int]) -> tuple[float, float]:
        """Return what the sums over positives and over negatives are divided by."""
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


def check_batch(scores: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return scores (n,) in ``dtype`` or a wider one, a mask of the positives, and the class sizes.

    Raises:
        ValueError: shapes do not fit, there is no sample, or labels are neither booleans nor 0 and 1.
    """
    for name, tensor in (("scores", scores), ("y", y)):
        require_kind("AUCMargin", name, tensor, Tensor, "a tensor")
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
