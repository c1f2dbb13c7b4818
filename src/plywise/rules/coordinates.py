"""Coordinates: any optimizer works in the eigenbasis of a layer's inputs, whitened."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.contract import LayerShape, Shapes, State
from plywise.engine.explain import Size
from plywise.engine.health import Health
from plywise.engine.rule import require_choice
from plywise.numerics.bases import TwoSidedBasis, find_bases, find_basis, list_tensors, make_basis
from plywise.numerics.eigenbasis import compute_eigenbasis
from plywise.rules._kronecker import KroneckerRule

Sides = Literal["input", "output", "both"]


@dataclass(frozen=True, eq=False)
class Coordinates(KroneckerRule):
    """Let any optimizer work in better coordinates of each layer.

    Idea: an optimizer such as Adam treats each weight by itself, which is right if the inputs are
        uncorrelated. Give it the gradient in coordinates in which they are, and transform its step back to
        the weights.
    Equation: W = V Tᵀ with a fixed T, so that the gradient of V is G T, and a step δV moves W by δV Tᵀ.
        T = Q (Λ + εI)^-power, with R = Q Λ Qᵀ the running mean of aaᵀ, a the inputs with a trailing 1, and Λ
        relative to its mean. With ``basis="root"`` T = Q (Λ + εI)^-power Qᵀ. On the output side the same
        with the output gradients' δδᵀ: G becomes Sᵀ G T. With ``keep_norm``, a layer's step is as long as
        the optimizer's own.
    Reduces to: with SGD, no momentum and no kept norm, power ½ is Foof (c = 1) and power ¼ feature whitening;
        power 0 with Adam is the right side of SOAP, from activations in place of gradients; power 0 with SGD
        and basis "root" is SGD.
    Use when: AdamW or Muon trains too slowly. Begin with Adam and power ¼.
    Do not use when: inputs are tens of thousands wide, or the optimizer's steps depend on the weights
        themselves (Adafactor, LAMB): attach refuses those by name.
    Layers: as for `plywise.Foof`.
    Cost: two products with T in each step (2mk² operations each, 4mkr in r directions). A refresh is a
        product with R, and a step of orthogonal iteration where the vectors have drifted by more than
        ``tolerance``; otherwise only Λ is measured again. Forward and backward are plain between gatherings.
    Status: after SOAP: its right side, from activations in place of gradients, whitened, for any optimizer;
        on wide sides of the leading directions alone.
    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025 (Adam in an
        eigenbasis); Benzing 2022 (inputs alone); Desjardins et al., "Natural Neural Networks", NeurIPS 2015
        (the whitened coordinates).
    Code: none found: ours.
    Results: in the arena (benchmarks/arena/README.md): Muon and AdamW, with it on the layers that
        `plywise.recommend` chooses, reach 64 of 70 targets tuned (Muon 66, NorMuon 64, SOAP 63, AdamW 11),
        in the fewest steps, and in 1.34 times the CPU time of each workload's best peer (Muon 1.26). AdamW
        with it on all layers reaches 34 of 40, where AdamW reaches 11.
    Limits: the first basis is used at once, a later one from the step after its refresh. A refresh turns
        momenta into the new basis. It keeps second moments as they are, as SOAP does, and a momentum of
        normalised steps (RMSprop's), too. If the optimizer has stepped before, its state is cleared when the
        rule is attached: second moments of other axes would make steps of any size. Sides above ``max_size``
        stay as they are. A step of orthogonal iteration is not a whole decomposition: while
        inputs have directions that they did not have before, T may be far from that of the exact eigenbasis
        (a quarter of its size where rows are few). It also depends on the basis of the directions without
        inputs from which the step began, which float32 and float64 choose differently. Under fully_shard,
        each step gathers a layer's gradients and steps on one process.

    Args:
        power: how far the inputs are whitened, 0 (turned only) to ½ (fully). Default 0.25. Range 0 to 0.5.
        damping: ε, relative to the mean eigenvalue. Default 0.3. Range 1e-4 to 10.
        basis: "eigen" turns into the eigenbasis; "root" whitens in the original axes. Default "eigen".
        sides: "input", "output" or "both". Default "input".
        output_power: as ``power``, for the output side. Default 0. Range 0 to 0.5.
        keep_norm: give a layer's step the length of the optimizer's own. Default True.
        decay: how much of the statistics stays at each gathering. Default 0.95. Range 0.5 to 0.999.
        rank: on sides at least twice as wide, turn only this many directions, and treat the others alike;
            None for all. Default 64. Range 8 to 512.
        sample: take every so many-th position along each axis of a convolution or sequence. Default 2.
            Range 1 to 4.
        max_size: a side wider than this stays as it is. Default 2048. Range 256 to 8192.
        stats_every: steps from one batch that enters the statistics to the next, at the start. Default 5.
            Range 1 to 100.
        refresh_every: steps from one basis to the next, at the start; a multiple of ``stats_every``. Default
            5. Range 1 to 100.
        slowdown: both intervals grow with the square root of the steps taken, since inputs change less and
            less: they are twice as long once 2 times ``refresh_every`` steps have been taken, 4 times as long
            after 8 times, and so on, until they are so many times as long. 1 keeps them. Default 8. Range 1
            to 16.
        tolerance: at a refresh, keep the vectors while the root mean square of ‖R v - λ v‖ / (λ + mean λ) is
            at most this; 0 improves them at each. Default 0.05. Range 0 to 0.2.

    Raises:
        ValueError: a hyper-parameter is out of range.
        AttachError: (by ``attach``) the optimizer cannot work in turned coordinates.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> rule = pw.Coordinates(power=0.25).attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    turns_steps: ClassVar[bool] = True

    acts_alone: ClassVar[bool] = False

    power: float = 0.25
    damping: float = 0.3
    basis: Literal["eigen", "root"] = "eigen"
    sides: Sides = "input"
    output_power: float = 0.0
    keep_norm: bool = True
    decay: float = 0.95
    rank: int | None = 64
    sample: int = 2
    max_size: int = 2048
    stats_every: int = 5
    refresh_every: int = 5
    slowdown: int = 8
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        require_choice(self, "basis", self.basis, ("eigen", "root"))
        require_choice(self, "sides", self.sides, ("input", "output", "both"))
        for name in ("power", "output_power"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"Coordinates: {name} must be between 0 and 1, not {value!r}.")
        if not isinstance(self.tolerance, int | float) or not self.tolerance >= 0:
            raise ValueError(f"Coordinates: tolerance must be 0 or above, not {self.tolerance!r}.")
        super().__post_init__()

    @property
    def left(self) -> float:  # type: ignore[override]
        """1 where the output side is turned, and so has a statistic."""
        return float(self.sides != "input")

    @property
    def right(self) -> float:  # type: ignore[override]
        """1 where the input side is turned."""
        return float(self.sides != "output")

    def update(self, call: LinearCall) -> Update:
        """Return the plain gradient: the step turns it."""
        return call.gradient()

    def in_backward(self, memory: State, shape: LayerShape) -> bool:
        """Never: the optimizer's step must be turned back afterwards."""
        return False

    # ---- at the step -------------------------------------------------------------------------

    def refresh(self, memory: State, name: str, health: Health) -> State:
        """Compute the bases of the statistics; keep the last good ones where that fails."""
        news: dict[str, Tensor] = {}
        for side, power in (("input", self.power), ("output", self.output_power)):
            if side not in memory:
                continue
            size = memory[side].shape[1]
            rank, last = self.choose_rank(size), memory.get(f"{side}.vectors")
            note = partial(health.note, name)
            count = memory[f"{side}.count"]
            found = compute_eigenbasis(memory[side], last, note, rank, count, self.tolerance)
            if found is None:
                eye = (
                    torch.eye(size, rank or size, device="cpu")
                    .to(memory[side])
                    .expand(len(memory[side]), -1, -1)
                )
                found = torch.ones_like(memory[side][:, 0]), eye if last is None else last
            values, vectors = found
            kept = find_basis(memory, side) if vectors is last else None
            basis = make_basis(vectors, (values + self.damping).pow(-power), self.basis == "eigen", kept)
            news |= {f"{side}.vectors": vectors, **list_tensors(basis, side)}
        return news

    def make_turn(self, memory: State) -> TwoSidedBasis | None:
        """Return the bases of layers' sides: gradients become ``Sᵀ G T``, and steps ``S δV Tᵀ``."""
        return find_bases(memory)

    def turn_momentum(self, before: State, after: State, momentum: Tensor) -> Tensor:
        """Return a sum of gradients, from the coordinates of one state to those of another; (g, m, k)."""
        old, new = find_bases(before), find_bases(after)
        momentum = momentum if old is None else old.solve(momentum)
        return momentum if new is None else new.turn(momentum, torch.empty_like(momentum))

    def turn_squares_back(self, state: State, squares: Tensor) -> Tensor:
        """As if entries were independent in the coordinates: ``E[G²] = (S⁻ᵀ)² E[X²] (T⁻¹)²``, entrywise."""
        right, left = find_basis(state, "input"), find_basis(state, "output")
        if right is not None:
            squares = squares @ torch.linalg.inv(right.as_matrix()).square()
        if left is not None:
            squares = torch.linalg.inv(left.as_matrix()).mT.square() @ squares
        return squares

    # ---- sizes -------------------------------------------------------------------------------

    def refreshed_shapes(self, shape: LayerShape) -> Shapes:
        """Eigenvectors and bases, dense or of some directions."""
        shapes: dict[str, tuple[int, ...]] = {}
        for side, n in self._sizes(shape).items():
            g, r = shape.groups, self.choose_rank(n)
            if r is None:
                parts: dict[str, tuple[int, ...]] = {"vectors": (g, n, n), "basis": (g, n, n)}
            elif self.basis == "eigen":
                parts = {"vectors": (g, n, r), "reflectors": (g, n, r), "factor": (g, r, r), "scales": (g, n)}
            else:
                parts = {"vectors": (g, n, r), "weights": (g, r), "tail": (g,)}
            shapes |= {f"{side}.{part}": size for part, size in parts.items()}
        return shapes

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Statistics, orthogonal iteration and the two products, once intervals are at their longest."""
        flops = floats = 0.0
        for side, own, other in (("input", size.d, size.m), ("output", size.m, size.d)):
            if side in self.list_powers(size.m, size.d):
                rank = self.choose_rank(own) or own
                flops += size.n / self.sample * own * own / (self.stats_every * self.slowdown)
                flops += 8.0 * own * own * rank / (self.refresh_every * self.slowdown)
                flops += (4.0 if rank == own else 8.0) * other * own * rank
                floats += own * own + 2.0 * own * rank
        return size.g * flops, size.g * floats

    def describe(self, size: Size | None) -> str:
        """Return the sides that are turned, e.g. ``"input side, power 0.25"``."""
        if size is None:
            return type(self).__name__
        turned = self.list_powers(size.m, size.d)
        powers = {"input": self.power, "output": self.output_power}
        text = ", ".join(f"{side} side, power {powers[side]:g}" for side in turned)
        return f"Coordinates: {text or f'sides larger than max_size={self.max_size}'}"
