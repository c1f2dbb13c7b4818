"""Normalised least mean squares: each sample's step divided by the squared norm of its input."""

from dataclasses import dataclass
from typing import Literal

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size, require_choice, require_positive
from plywise.rules import _least_squares as solve


@dataclass(frozen=True, eq=False)
class NLMS(Rule):
    """Normalised least mean squares (NLMS) in every layer.

    Idea: the step -ηδaᵀ is meant to change the layer's output by -ηδ, but changes it by -η‖a‖²δ. Divided by
        ‖a‖², it changes the output as intended, whatever the size of the input.
    Equation: D = mean over samples of δ_i [a_i,1] / (‖[a_i,1]‖² + ε), δ of the summed loss and ε = eps
        times the mean of ‖[a,1]‖². The layer below receives ΔW.
    Use when: the inputs of a layer differ much in size between samples, and steps must stay cheap.
    Do not use when: the samples of a batch are similar: only Consequentialism corrects for their effect on
        each other. In our runs plain NLMS is no better than SGD on well-scaled networks.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. `explain` says what is left alone, and why.
    Cost: one pass over A and one over Δ.
    Status: variant: the filter of one sample, in every layer of a network; over a batch its steps are
        averaged, and ε is relative to the batch's mean squared norm.
    Source: Widrow, Hoff (1960); Nagumo, Noda (1967); as the starting point of Paeedeh, Ghiasi-Shirazi,
        arXiv 2003.05164 (2020).
    Code: none found.
    Results: those of the papers are for single filters. Ours on the digits: final training loss 0.017 as
        momentum SGD on a well-scaled network, 0.204 against 0.129 on a badly rescaled one
        (benchmarks/README.md). Hardly ever reaches a target of the arena (benchmarks/arena/README.md).
    Limits: with convolutions the positions of one sample are rows of their own and add up. k accumulated
        micro-batches (loss divided by k) give the update of the joined batch, except that ε is relative to
        the mean of each micro-batch.

    Args:
        eps: damping relative to the mean squared norm of the rows. Default 0.1. Range 1e-3 to 1.
        reduction: how the loss is averaged over the samples, ``"mean"`` or ``"sum"``; the update is the same
            for both.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> rule = pw.NLMS(eps=1e-9).attach(model)
        >>> (0.5 * (model(torch.tensor([[3.0, 4.0]])) - 1).square()).sum().backward()
        >>> with torch.no_grad():
        ...     _ = model.weight.sub_(model.weight.grad)
        >>> model(torch.tensor([[3.0, 4.0]])).round(decimals=4)  # one step of rate 1 lands on the target
        tensor([[1.]], grad_fn=<RoundBackward1>)
        >>> rule.detach()
    """

    eps: float = 0.1  # ε, relative
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_positive(self, eps=self.eps)
        require_choice(self, "reduction", self.reduction, ("mean", "sum"))

    def update(self, call: LinearCall) -> Update:
        """Δ with each row divided by its own norm, then backpropagation's product."""
        return solve.normalised(call.times(1 if self.reduction == "mean" else 1 / call.samples), self.eps)

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Return a pass over A, a pass over Δ and the new Δ."""
        return size.g * size.n * (2.0 * size.d + size.m), float(size.g * size.n * size.m)
