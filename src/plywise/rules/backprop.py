"""Backpropagation itself, through the machinery of the rules: a control with equal overhead."""

from dataclasses import dataclass

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size


@dataclass(frozen=True, eq=False)
class Backprop(Rule):
    """Backpropagation, the identity among the rules.

    Idea: one explicit gradient step for every layer. Attached, it changes how gradients are computed, but not
        their values. As a control in comparisons it has the same overhead as any other rule.
    Equation: D = G = ΔᵀA; the layer below receives ΔW.
    Use when: you compare rules, or measure the cost of attaching a rule.
    Do not use when: you just want to train: leave it out.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. `explain` says what is left alone, and why.
    Cost: nothing but the hooks (benchmarks/step_cost.py, row "Backprop").
    Status: faithful: the gradient that autograd would compute, by the code that every rule uses.
    Source: Rumelhart, Hinton, Williams, Nature 323 (1986); as a control in Frerix et al. (2018), whose
        code has it as mode "gradient".
    Code: tfrerix/proxprop (the mode "gradient").
    Results: a step costs 1.00 to 1.05 of a plain one on one thread, 1.01 to 1.15 on two
        (benchmarks/README.md).
    Limits: none.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Linear(2, 1)
        >>> rule = pw.Backprop().attach(model)
        >>> model(torch.ones(4, 2)).mean().backward()
        >>> model.weight.grad
        tensor([[1., 1.]])
        >>> rule.detach()
    """

    def update(self, call: LinearCall) -> Update:
        """``G = ΔᵀA``."""
        return call.gradient()

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Nothing extra."""
        return 0.0, 0.0
