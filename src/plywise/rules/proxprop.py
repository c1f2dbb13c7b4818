"""Proximal backpropagation: an implicit instead of an explicit step on each layer's weights."""

from dataclasses import dataclass
from typing import Literal

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size, require_choice, require_positive
from plywise.rules import _least_squares as solve
from plywise.rules._conjugate_gradients import conjugate_gradients, official_conjugate_gradients


@dataclass(frozen=True, eq=False)
class ProxProp(Rule):
    """Proximal backpropagation.

    Idea: backpropagation is a sweep of explicit gradient steps on a penalty function, in which each layer has
        its own least-squares problem. Replace the step of the weights by the implicit (proximal) step, which
        is stable at any step size: θ⁺ = argmin ½‖A θᵀ - z⁺‖² + ‖θ - θ_old‖²/(2τ).
    Equation: D = G (AᵀA + I/τ)⁻¹ with A the rows [input, 1] of the batch, G = ΔᵀA. The layer below
        receives ΔW. A convolution's rows are its patches.
    Use when: inputs are wide or strongly correlated and batches of a few hundred fit: it then takes many
        times fewer steps than SGD or Adam. Rates are large: try 1 to 10 with a mean loss.
    Do not use when: the batch is tiny (the Gram of a few rows says little), or only the time per step
        matters.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them: on the character transformer they raise the
        validation loss from 2.39 to 2.49 (benchmarks/README.md). `explain` says what is left alone, and why.
    Cost: a Gram of rows or inputs, whichever are fewer, its inverse, and one product: 1.32 to 1.84 of a plain
        step on wide networks and a ConvNet, 4.6 where a plain step takes less than a millisecond; by three
        conjugate gradient steps 1.6 to 3.0, and 7 to 8 on small ones (benchmarks/README.md, by
        `python benchmarks/step_cost.py`).
    Status: faithful with ``last_layer="explicit"``, as in the paper; our default solves the last layer, too.
        ``solver="exact"`` solves for the update itself; the published code subtracts two weights in float32,
        and the difference is mostly rounding errors. Its conjugate gradients differ from the textbook's, too:
        they are ``solver="cg_official"``. The penalty function E with its ρ and γ, and sweeps over it:
        `plywise.PenaltyView`.
    Source: Frerix, Möllenhoff, Moeller, Cremers, "Proximal Backpropagation", ICLR 2018, eqs. 7-12 and
        Proposition 2.
    Code: tfrerix/proxprop.
    Results: the paper's, on CIFAR-10: test accuracy 56 % against backpropagation's 54 % (MLP), 70.7 against
        69.6 % (ConvNet), training loss of the MLP 0.002 (cg3) and 0.0003 (cg5) against 0.091. Ours, in full:
        70.9 against 67.2 % (ConvNet, cg3, two seeds), 0.0024 and 0.0006 against 0.066 (one seed); small:
        stable at rates 1 and 10, where backpropagation diverges, as in the paper (benchmarks/reproduce);
        AdamW's final training loss in 0.26 (digits) and 0.45 (MNIST) of its steps (benchmarks/README.md).
    Limits: AᵀA is the sum over the batch as in the paper, so the method depends on the batch size (k copies
        of a batch act as kτ); with ``gram="mean"`` it does not. k accumulated micro-batches average k
        updates, which is not the update of the joined batch. The last layer is the one that backward meets
        first: where the model has several heads, and in stages of a pipeline, name those that take
        explicit steps by ``attach(..., exclude=...)``.

    Args:
        tau: proximal step size τ (τ_θ in the paper); larger trusts the local problem more. τ → 0 is
            backpropagation scaled by τ. Default 1. Range 0.01 to 100.
        solver: ``"exact"``; ``"cg"``, conjugate gradients for each output; ``"cg_flat"``, conjugate gradients
            on all parameters of a layer as one vector, as the paper describes it; ``"cg_official"``, the
            iteration of the published code: its second direction is too long, 1e-6 is added to both
            denominators, and convolutions are flat, linear layers not.
        cg_steps: number of conjugate gradient steps. Default 3. Range 1 to 10.
        gram: ``"sum"`` over the rows as in the paper, or ``"mean"``, which divides AᵀA by their number
            (then G of a mean loss and the Gram scale alike, and τ means the same at any batch size).
        last_layer: ``"implicit"``, or ``"explicit"`` for the paper's rule: the last layer moves by G.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        >>> rule = pw.ProxProp(tau=1.0).attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    tau: float = 1.0  # τ_θ
    solver: Literal["exact", "cg", "cg_flat", "cg_official"] = "exact"
    cg_steps: int = 3
    gram: Literal["sum", "mean"] = "sum"
    last_layer: Literal["implicit", "explicit"] = "implicit"

    def __post_init__(self) -> None:
        require_positive(self, tau=self.tau, cg_steps=self.cg_steps)
        require_choice(self, "solver", self.solver, ("exact", "cg", "cg_flat", "cg_official"))
        require_choice(self, "gram", self.gram, ("sum", "mean"))
        require_choice(self, "last_layer", self.last_layer, ("implicit", "explicit"))
        if int(self.cg_steps) != self.cg_steps:
            raise ValueError(f"ProxProp: cg_steps must be a whole number, not {self.cg_steps!r}.")

    def update(self, call: LinearCall) -> Update:
        """Return ``G (AᵀA + I/τ)⁻¹``, with AᵀA/n for the mean Gram; G where the step is explicit."""
        if self._is_explicit(call.is_topmost):
            return call.gradient()
        # (AᵀA/n + I/τ)⁻¹ = n (AᵀA + n I/τ)⁻¹: the mean is the sum with another τ, scaled
        rows = call.row_count if self.gram == "mean" else 1
        damping = rows / self.tau
        call = call.times(rows)
        if self.solver == "exact":
            return solve.ridge(call, damping)
        if self.solver in ("cg", "cg_flat"):
            return conjugate_gradients(call, damping, self.cg_steps, flat=self.solver == "cg_flat")
        return official_conjugate_gradients(call, damping, self.cg_steps)

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Exact: Gram, inverse, product. CG: Gram and one product with it a step."""
        if self._is_explicit(size.is_topmost):
            return 0.0, 0.0
        k = min(size.n, size.d)
        if self.solver == "exact":
            return size.exact_solve, 2.0 * size.g * k * k
        products = 2.0 * k * k * size.m * (self.cg_steps + 1)
        return size.g * (k * k * max(size.n, size.d) + products), size.g * (k * k + 6.0 * k * size.m)

    def describe(self, size: Size | None) -> str:
        """Return the rule's name, and where its step is explicit."""
        is_explicit = size is not None and self._is_explicit(size.is_topmost)
        return "ProxProp: explicit step" if is_explicit else "ProxProp"

    def _is_explicit(self, is_topmost: bool) -> bool:
        """Return whether a layer takes the plain step: the last one, with ``last_layer="explicit"``."""
        return is_topmost and self.last_layer == "explicit"
