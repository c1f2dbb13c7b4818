"""Consequentialism weight updates (CWU): correct each sample's error for what all samples do to it."""

from dataclasses import dataclass
from typing import Literal

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size, require_choice, require_positive
from plywise.rules import _least_squares as solve


@dataclass(frozen=True, eq=False)
class Consequentialism(Rule):
    """Consequentialism weight updates (CWU) over mini-batches.

    Idea: the network is a stack of adaptive filters. Together, the steps of all samples of a batch change the
        outputs not by the intended -ηΔ but by -η(AAᵀ)Δ: samples disturb each other. Predict this effect and
        correct the errors before the step; then the outputs change as intended.
    Equation: (AAᵀ + εI) Δ̃ = Δ, D = Δ̃ᵀA, Δ of the summed loss: backpropagation's product with the
        transpose of A replaced by its damped pseudo-inverse (the affine projection filter in each layer).
        The layer below receives the plain ΔW.
    Use when: inputs are correlated, layers badly scaled, or tuning the rate is a burden: rates of 0.1 to
        1 work at any batch size.
    Do not use when: gradients are mostly noise (tiny batches, noisy labels): it fits each batch closely.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. `explain` says what is left alone, and why.
    Cost: that of exact ProxProp, which it equals up to the damping and the averaging of the loss.
    Status: after the paper, whose body could not be read: the system above follows from its abstract and
        introduction; the damping and the treatment of the bias are a reconstruction.
    Source: Paeedeh, Ghiasi-Shirazi, "Improving the Backpropagation Algorithm with Consequentialism Weight
        Updates over Mini-Batches", arXiv 2003.05164, Neurocomputing 461 (2021).
    Code: none found.
    Results: the paper's abstract says "usually fewer iterations"; no number is known. Ours on MNIST (MLP, 234
        steps): training loss 0.0081 against 0.196 of SGD and 0.101 of SGD with Nesterov momentum
        (benchmarks/reproduce/consequentialism.json). Lowest on three of five badly scaled networks
        (benchmarks/README.md).
    Limits: not equivariant to rescaled layers. L layers that are updated together can overshoot by a factor
        of up to L: take rates below 1. k accumulated micro-batches average k updates.

    Args:
        eps: damping relative to the mean non-zero eigenvalue of the Gram. None is 1 for ``bias="centre"`` and
            0.1 for ``bias="append"`` (they normalise differently). Default None. Range 1e-3 to 10.
        bias: ``"centre"`` solves for the weight on centred rows and targets, then for the bias;
            ``"append"`` treats it as the weight of a constant input 1.
        reduction: how the loss is averaged over the samples, ``"mean"`` or ``"sum"``; the update is the same
            for both.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        >>> rule = pw.Consequentialism().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    eps: float | None = None  # ε, relative
    bias: Literal["centre", "append"] = "append"
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_choice(self, "bias", self.bias, ("centre", "append"))
        require_choice(self, "reduction", self.reduction, ("mean", "sum"))
        if self.eps is None:
            object.__setattr__(self, "eps", 1.0 if self.bias == "centre" else 0.1)
        require_positive(self, eps=self.eps)  # type: ignore[arg-type]

    def update(self, call: LinearCall) -> Update:
        """``Δ̃ᵀA``, of the summed loss."""
        assert self.eps is not None
        call = call.times(1 if self.reduction == "sum" else call.samples)
        if self.bias == "centre" and call.has_bias:
            return solve.ridge_centred(call, self.eps)
        return solve.ridge(call, solve.RelativeDamping(call, self.eps))

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """As an exact solve."""
        return size.exact_solve, 2.0 * size.g * min(size.n, size.d) ** 2
