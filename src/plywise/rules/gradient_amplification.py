"""Gradient amplification: the backward values of some layers are multiplied by a factor for a while."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plywise._util.checks import is_number
from plywise.engine.call import LinearCall, Update
from plywise.engine.contract import Evidence, LayerShape, Shapes, State
from plywise.engine.explain import Size
from plywise.engine.rule import StatefulRule, require_choice, require_positive, require_whole


@dataclass(frozen=True, eq=False)
class GradientAmplification(StatefulRule):
    """After gradient amplification and intelligent gradient amplification.

    Idea: multiply the gradients of a changing choice of layers by a factor, so that early layers of deep
        networks, whose gradients are small, learn at high rates too.
    Equation: mode "signal": Δ ← f Δ at the output of each chosen layer, for its own move and for what the
        layer below receives (f to the power of the chosen layers above); mode "gradient": D = f G alone. A
        layer is chosen at random with probability ``share``, or, with ``agreement``, where
        Σᵢ|Σₜ Gₜᵢ| / Σᵢ Σₜ|Gₜᵢ|, over the steps t of the last period, is at least that.
    Use when: you reproduce the papers. BackMatching is the principled version.
    Do not use when: the optimizer is Adam or RMSprop and the mode "gradient": they cancel the factor.
    Layers: every call of a linear map, embeddings and norms included in mode "signal": what is left alone
        would get an amplified gradient. Shared and computed weights (weight norm, pruning) are never
        chosen; `explain` says why.
    Cost: a product of Δ with a number; with ``agreement``, a copy of the gradients.
    Status: after the papers. Their text does not say which of the two modes they use, nor with what measure,
        and in which direction, "intelligent" amplification compares layers: both are our choice.
    Source: Basodi, Ji, Zhang, Pan, "Gradient Amplification: An Efficient Way to Train Deep Neural Networks",
        Big Data Mining and Analytics 2020, arXiv 2006.10560; Basodi, Pusuluri, Xiao, Pan, "Intelligent
        gradient amplification for deep neural networks", arXiv 2305.18445 (2023).
    Code: none found.
    Results: the second paper's, from its abstract: accuracy up by about 2.5 % on CIFAR-10 and 4.5 % on
        CIFAR-100. Not reproduced here: the procedure is not public in full.
    Limits: layers are chosen independently of each other, not a fixed number of them. In mode "signal" the
        factors of chosen layers multiply on the way down, so that the front of a deep network may get f to a
        high power.

    Args:
        factor: f. Default 2. Range 1 to 10.
        share: probability that a layer is chosen, in (0, 1]. Default 0.5. Range 0.1 to 1.
        mode: ``"signal"`` or ``"gradient"``, see the equation.
        agreement: choose by this threshold in (0, 1] instead of at random; None for random. Default None.
            Range 0.1 to 1.
        every: number of steps from one choice to the next. Default 100. Range 1 to 1000.
        rest: periods without amplification after each period with it: the papers amplify for some epochs, and
            not for others. Default 0. Range 0 to 10.
        until: no new choice after so many steps (the last one ends with its period); None for always. Default
            None. Range 100 to 100000.
        seed: seed of the random choice. Default 0.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rule = pw.GradientAmplification(factor=3.0, every=10).attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    factor: float = 2.0
    share: float = 0.5
    mode: Literal["signal", "gradient"] = "signal"
    agreement: float | None = None
    every: int = 100
    rest: int = 0
    until: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice(self, "mode", self.mode, ("signal", "gradient"))
        require_positive(self, factor=self.factor, share=self.share)
        require_whole(self, every=self.every, **({} if self.until is None else {"until": self.until}))
        if not is_number(self.rest) or self.rest < 0 or self.rest % 1 != 0:
            raise ValueError(f"GradientAmplification: rest must be a whole number, 0 or more: {self.rest!r}.")
        if self.agreement is not None:
            require_positive(self, agreement=self.agreement)
        if self.share > 1:
            raise ValueError(f"GradientAmplification: share must be at most 1, not {self.share!r}.")

    @property
    def alters_backward(self) -> bool:
        """Mode "gradient" sends plain gradients down."""
        return self.mode == "signal"

    @property
    def stats_every(self) -> int:  # type: ignore[override]
        """A choice a period."""
        return self.every

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """A choice a period."""
        return self.every

    def update(self, call: LinearCall) -> Update:
        """``f G`` for a chosen layer."""
        return call.gradient(self._amplify(call))

    def input_gradient(self, call: LinearCall) -> Tensor:
        """``f ΔW`` for a chosen layer in mode "signal"."""
        return call.input_gradient(self._amplify(call) if self.mode == "signal" else None)

    def _amplify(self, call: LinearCall) -> Tensor:
        factor = call.memory.get("factor")
        return call.delta if factor is None else call.delta * factor.to(call.delta.dtype)

    def gather(self, call: LinearCall, turn: int) -> Evidence:
        """Return the number of the period that begins, and this layer's random number for it."""
        name = f"{self.seed} {turn} {call.name}".encode()  # the same on every process and after a resume
        dice = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        rows = torch.ones((), dtype=call.dtype, device=call.delta.device)
        return {"rows": rows, "dice": rows * dice, "period": rows * turn}

    def learn(self, memory: State, evidence: Evidence) -> State:
        """Choose this layer, or not, for the next period."""
        rows = evidence["rows"]  # backward passes of this step, over all processes
        one = torch.ones_like(rows)
        if self.agreement is None:
            chosen = evidence["dice"] / rows < self.share
        elif "sum" in memory:
            chosen = memory["sum"].abs().sum() >= self.agreement * memory["total"]
        else:
            chosen = one < 0
        period = evidence["period"] / rows
        if self.rest:
            chosen &= period.round() % (self.rest + 1) == 0
        if self.until is not None:
            chosen &= period * self.every + 1 < self.until
        news = {"factor": torch.where(chosen, one * self.factor, one)}
        if "sum" in memory:
            news |= {"sum": torch.zeros_like(memory["sum"]), "total": torch.zeros_like(one)}
        return news

    def finish(self, memory: State, gradient: Update, groups: int) -> tuple[Update, State]:
        """Sum up the gradients and their sizes where the choice depends on them."""
        if self.agreement is None:
            return gradient, {}
        matrix = gradient.matrix(groups).to(memory["factor"].dtype)
        total = matrix.abs().sum()
        if "sum" not in memory:
            return gradient, {"sum": matrix.clone(), "total": total}
        return gradient, {"sum": memory["sum"] + matrix, "total": memory["total"] + total}

    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """Scalars."""
        return {"rows": (), "dice": (), "period": ()}

    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """Return the factor in force, and the gradients' sums."""
        sums: Shapes = {"sum": (shape.groups, shape.outputs, shape.columns), "total": ()}
        return {"factor": (), **(sums if self.agreement is not None else {})}

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Return a pass over Δ, and with ``agreement`` two over G."""
        weights = 0.0 if self.agreement is None else float(size.g * size.m * size.d)
        return size.g * float(size.n * size.m) + 3 * weights, weights
