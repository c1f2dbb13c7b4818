"""``D = c · L^-p G R^-q``: the mechanism of every rule that preconditions G by covariances of A and Δ.

``R``, of the inputs' rows, and ``L``, of the output gradients' rows, are running statistics. Their inverse
roots are made at a refresh, and used until the next. ``c`` keeps the size of G.

The step makes the move from G, at 2mk² operations for the input side, with c measured exactly. With fewer
rows than outputs, ``Δᵀ(A R^-q)`` costs 2nk² only: backward does that between refreshes, with the c of the
last refresh, since G itself is not made then.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from plywise.explain import Size
from plywise.health import Health
from plywise.kept_layer import LayerShape
from plywise.layers import lower_product
from plywise.low_rank import LowRank, low_rank_root, rows_times_root, times_root
from plywise.memory import Evidence, Memory, MemoryRule, Shapes
from plywise.ply import Move, Ply
from plywise.roots import Relative, Solver, inverse_root, solver_for
from plywise.rule import require_choice, require_positive, require_whole

Root = Tensor | LowRank


@dataclass(frozen=True)
class Kronecker:
    """Settings of a `KroneckerRule`; `plywise.Precondition` documents them.

    Example:
        >>> Kronecker(right=0.5, damping=1e-3, relative_to="max").sides(64, 785)
        {'input': 0.5}
    """

    left: float = 0.0
    right: float = 1.0
    decay: float = 0.95
    statistic: Literal["mean", "sum"] = "mean"
    damping: float = 0.1
    relative_to: Relative = "mean"
    keep_norm: bool = True
    solver: Solver = "auto"
    rank: int | None = None
    sample: int = 1
    max_size: int = 8192

    def sides(self, outputs: int, columns: int) -> dict[str, float]:
        """The statistics that a layer of these sizes keeps, each with its power."""
        powers = {"input": (self.right, columns), "output": (self.left, outputs)}
        return {side: power for side, (power, size) in powers.items() if power and size <= self.max_size}

    def rank_of(self, size: int) -> int | None:
        """Rank of a root of this size, None for a dense one: half the size and more is no saving."""
        return None if self.rank is None or 2 * self.rank >= size else self.rank


class KroneckerRule(MemoryRule):
    """A rule whose move is ``c · L^-p G R^-q``; abstract. Subclasses say with which settings."""

    @property
    @abstractmethod
    def plan(self) -> Kronecker:
        """Powers, statistics, damping and solver."""

    def check(self) -> None:
        """Refuse settings that are out of range; for the subclass's ``__post_init__``."""
        plan = self.plan
        require_positive(self, decay=plan.decay, damping=plan.damping)
        require_whole(
            self, sample=plan.sample, stats_every=self.stats_every, refresh_every=self.refresh_every
        )
        require_whole(self, max_size=plan.max_size, **({} if plan.rank is None else {"rank": plan.rank}))
        require_choice(self, "relative_to", plan.relative_to, ("mean", "max", "absolute"))
        if plan.decay > 1:
            raise ValueError(f"{type(self).__name__}: decay must be at most 1, not {plan.decay!r}.")
        powers = [power for power in (plan.left, plan.right) if power]
        if not powers or not all(0 < power < math.inf for power in powers):
            raise ValueError(
                f"{type(self).__name__}: left and right must be 0 or above, finite, and not both 0, not "
                f"{plan.left!r} and {plan.right!r}."
            )
        for power in powers:
            try:
                solver_for(plan.solver, power)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: solver: {error}.") from None
        if self.refresh_every % self.stats_every:
            raise ValueError(
                f"{type(self).__name__}: refresh_every must be a multiple of stats_every "
                f"({self.stats_every}), not {self.refresh_every}: a root is made from its own batch too."
            )

    # ---- in backward -------------------------------------------------------------------------

    def move(self, ply: Ply) -> Move:
        """``c · L^-p G R^-q`` by what is remembered, or the plain gradient if that waits for the step."""
        if ply.waits or not ply.memory:
            return ply.gradient()
        left, right = root_of(ply.memory, "output"), root_of(ply.memory, "input")
        return preconditioned(ply, left, right, ply.memory["scale"])

    def in_backward(self, memory: Memory, shape: LayerShape) -> bool:
        """Where each product is smaller with the rows than with G, and c has been measured."""
        sides = self.plan.sides(shape.outputs, shape.columns)
        limits = {"input": shape.outputs, "output": shape.columns}
        fewer = bool(sides) and bool(memory["rows"] < min(limits[side] for side in sides))
        return fewer and bool(memory["scale"] > 0)

    def gather(self, ply: Ply, turn: int) -> Evidence:
        """``AᵀA`` and ``ΔᵀΔ``, as far as they are needed; lower triangles."""
        sides = self.plan.sides(ply.outputs, ply.columns)
        evidence = {"rows": torch.tensor(float(ply.row_count), dtype=ply.dtype, device=ply.delta.device)}
        if "input" in sides:
            evidence["input"], rows = ply.sampled_gram(ply.dtype, self.plan.sample, turn)
            evidence["rows"].fill_(rows)
        if "output" in sides:
            evidence["output"] = lower_product(ply.delta_rows().mT)
        return evidence

    # ---- at the step -------------------------------------------------------------------------

    def learn(self, memory: Memory, evidence: Evidence) -> Memory:
        """Add to the discounted sums, and to the discounted counts that make means of them."""
        decay = self.plan.decay
        counts = {"input": evidence["rows"], "output": torch.ones_like(evidence["rows"])}
        news = {"rows": evidence["rows"]}
        for side in ("input", "output"):
            if side not in evidence:
                continue
            for key, value in ((side, evidence[side]), (f"{side}.count", counts[side])):
                news[key] = torch.add(value, memory[key], alpha=decay) if key in memory else value
        return news

    def refresh(self, memory: Memory, name: str, health: Health) -> Memory:
        """The roots of the statistics; the last good ones where that fails."""
        plan = self.plan
        unknown = torch.full_like(memory["rows"], 0.0 if plan.keep_norm else 1.0)  # c, until it is measured
        news = {"scale": memory.get("scale", unknown)}
        for side, power in (("input", plan.right), ("output", plan.left)):
            if side not in memory:
                continue
            statistic = memory[side]
            if plan.statistic == "mean":
                statistic = statistic / memory[f"{side}.count"]
            last, rank = root_of(memory, side), plan.rank_of(statistic.shape[1])
            note = partial(health.note, name)
            root: Root | None
            if rank is None:
                root = inverse_root(statistic, power, plan.damping, plan.relative_to, plan.solver, note)
            else:
                start = last.vectors if isinstance(last, LowRank) else None
                root = low_rank_root(statistic, power, plan.damping, plan.relative_to, rank, start)
            if root is None:
                root = last if last is not None else _identity(statistic, rank)
            news.update(_entries(side, root))
        return news

    def finish(self, memory: Memory, gradient: Move, groups: int) -> tuple[Move, Memory]:
        """``c · L^-p G R^-q`` of the gradient at hand, and its ``c``."""
        left, right = root_of(memory, "output"), root_of(memory, "input")
        assert gradient.weight is not None
        if left is None and right is None:
            return gradient, {}
        matrix = gradient.matrix(groups).to(memory["rows"].dtype)
        moved = _between(matrix, left, right)
        news = {}
        if self.plan.keep_norm:
            size, own = torch.linalg.vector_norm(matrix), torch.linalg.vector_norm(moved)
            news["scale"] = torch.where(own > 0, size / own, memory["scale"])  # zeros say nothing of c
            moved = moved * news["scale"]
        return Move.of(moved, gradient.weight.shape, gradient.bias is not None), news

    # ---- sizes -------------------------------------------------------------------------------

    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """``AᵀA``, ``ΔᵀΔ`` and the number of rows."""
        return {"rows": (), **{side: (shape.groups, n, n) for side, n in self._sizes(shape).items()}}

    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """The discounted sums and counts."""
        sums = {side: (shape.groups, n, n) for side, n in self._sizes(shape).items()}
        return {"rows": (), **sums, **{f"{side}.count": () for side in sums}}

    def refreshed_shapes(self, shape: LayerShape) -> Shapes:
        """The roots, dense or of low rank, and c."""
        shapes: dict[str, tuple[int, ...]] = {"scale": ()}
        for side, n in self._sizes(shape).items():
            rank, g = self.plan.rank_of(n), shape.groups
            if rank is None:
                shapes[f"{side}.root"] = (g, n, n)
            else:
                low = {"vectors": (g, n, rank), "weights": (g, rank), "scale": (g,)}
                shapes.update({f"{side}.{part}": size for part, size in low.items()})
        return shapes

    def refresh_cost(self, shape: LayerShape) -> float:
        """Operations of the roots, up to a factor."""
        cost = 0.0
        for n in self._sizes(shape).values():
            rank = self.plan.rank_of(n)
            cost += shape.groups * float(n * n * (n if rank is None else 2 * rank))
        return cost

    def _sizes(self, shape: LayerShape) -> dict[str, int]:
        sizes = {"input": shape.columns, "output": shape.outputs}
        return {side: sizes[side] for side in self.plan.sides(shape.outputs, shape.columns)}

    def price(self, size: Size) -> tuple[float, float]:
        """Statistics, roots (as n³ or 2n²r) and products, shared out over the steps of a cycle."""
        plan = self.plan
        sides = {
            side: (own, other)
            for side, own, other in (("input", size.d, size.m), ("output", size.m, size.d))
            if side in plan.sides(size.m, size.d)
        }
        flops = floats = 0.0
        for n, other in sides.values():
            rank = plan.rank_of(n)
            flops += size.n / plan.sample * n * n / self.stats_every
            flops += float(n**3 if rank is None else 2 * n * n * rank) / self.refresh_every
            flops += (2.0 * n if rank is None else 4.0 * rank) * n * min(size.n, other)
            floats += n * n + (n * n if rank is None else n * rank)
        return size.g * flops, size.g * floats

    def treatment(self, size: Size | None) -> str:
        """The sides that are preconditioned, e.g. ``"L^-½ G R^-½"``."""
        name, plan = type(self).__name__, self.plan
        if size is None:
            return name
        sides = plan.sides(size.m, size.d)
        left, right = (f"^-{power:g}" if power else "" for power in (plan.left, plan.right))
        text = f"{f'L{left} ' if 'output' in sides else ''}G{f' R{right}' if 'input' in sides else ''}"
        wanted = {side for side, power in (("input", plan.right), ("output", plan.left)) if power}
        missing = [
            f"{side} side larger than max_size={plan.max_size}" for side in sorted(wanted - sides.keys())
        ]
        return f"{name}: {text}, every {self.refresh_every} steps" + "".join(f" ({text})" for text in missing)


def preconditioned(ply: Ply, left: Root | None, right: Root | None, scale: Tensor | None = None) -> Move:
    """``scale · left · G · right``, each product made with the rows where they are fewer than G's."""
    if scale is not None:
        ply = replace(ply, delta=ply.delta * scale.to(ply.delta.dtype))
    if left is not None and ply.row_count < ply.columns:
        ply, left = replace(ply, delta=ply.from_delta_rows(times_root(ply.delta_rows(), left))), None
    if right is not None and ply.kind.rows_are_inputs and ply.row_count < ply.outputs:
        rows, last = rows_times_root(ply.a.reshape(-1, ply.width).to(ply.dtype), right, ply.has_bias)
        delta = ply.delta_rows()[0].T
        weight = (delta @ rows).reshape(ply.weight.shape)
        move, right = Move(weight, None if last is None else delta @ last), None
    else:
        move = ply.gradient()
    if left is None and right is None:
        return move
    return ply.move(_between(ply.matrix(move).to(ply.dtype), left, right))


def _between(matrix: Tensor, left: Root | None, right: Root | None) -> Tensor:
    """``left · matrix · right``."""
    moved = matrix if right is None else times_root(matrix, right)
    return moved if left is None else times_root(moved.mT, left).mT


def root_of(memory: Memory, side: str) -> Root | None:
    """The inverse root of a side's statistic that a layer remembers."""
    if f"{side}.root" in memory:
        return memory[f"{side}.root"]
    if f"{side}.vectors" in memory:
        return LowRank(*(memory[f"{side}.{part}"] for part in ("vectors", "weights", "scale")))
    return None


def _entries(side: str, root: Root) -> dict[str, Tensor]:
    if isinstance(root, LowRank):
        parts = {"vectors": root.vectors, "weights": root.weights, "scale": root.scale}
        return {f"{side}.{part}": value for part, value in parts.items()}
    return {f"{side}.root": root}


def _identity(like: Tensor, rank: int | None) -> Root:
    groups, size, _ = like.shape
    eye = torch.eye(size, dtype=like.dtype, device=like.device).expand(groups, size, size)
    if rank is None:
        return eye.clone()
    return LowRank(eye[:, :, :rank].clone(), like.new_zeros(groups, rank), like.new_ones(groups))
