"""``D = c · L^-p G R^-q``: the mechanism of every rule that preconditions G by covariances of A and Δ.

``R``, of the inputs' rows, and ``L``, of the output gradients' rows, are running statistics. Their inverse
roots are made at a refresh, and used until the next. ``c`` keeps the size of G.

The step computes the update from G, at 2mk² operations for the input side, and measures c exactly. With fewer
rows than outputs, ``Δᵀ(A R^-q)`` costs 2nk² only. Then backward computes the update between refreshes. It
does not compute G itself, and therefore takes the c of the last refresh.
"""

import math
from dataclasses import fields, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from plywise._util.checks import is_number
from plywise.engine.call import LinearCall, Update
from plywise.engine.contract import Evidence, LayerShape, Shapes, State
from plywise.engine.explain import Size
from plywise.engine.finite import is_precise
from plywise.engine.health import Health
from plywise.engine.rule import StatefulRule, require_choice, require_positive, require_whole
from plywise.numerics.inverse_roots import Relative, Solver, compute_inverse_root, get_solver
from plywise.numerics.low_rank import (
    LowRankRoot,
    compute_low_rank_root,
    measure_square_gain,
    multiply_by_root,
    multiply_rows_by_root,
)
from plywise.numerics.products import compute_lower_product

Root = Tensor | LowRankRoot

SAFE = 1e3
"""The least mean square of rows whose Gram keeps its digits, in units of the smallest normal number."""


class KroneckerRule(StatefulRule):
    """Base class of rules with the update ``c · L^-p G R^-q``.

    The attributes below are its settings, which `plywise.Precondition` documents. A subclass has other
    values, or makes hyper-parameters of them.
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

    def list_powers(self, outputs: int, columns: int) -> dict[str, float]:
        """Return the statistics that a layer of these sizes keeps, each with its power."""
        powers = {"input": (self.right, columns), "output": (self.left, outputs)}
        return {side: power for side, (power, size) in powers.items() if power and size <= self.max_size}

    def choose_rank(self, size: int) -> int | None:
        """Return the rank of a root of this size; None, for a dense root, if the rank would save nothing."""
        return None if self.rank is None or 2 * self.rank >= size else self.rank

    def __post_init__(self) -> None:
        """Refuse settings that are out of range."""
        self._set_cadence()
        require_positive(self, decay=self.decay, damping=self.damping)
        intervals = {name: getattr(self, name) for name in ("stats_every", "refresh_every", "slowdown")}
        require_whole(self, sample=self.sample, **intervals)
        require_whole(self, max_size=self.max_size, **({} if self.rank is None else {"rank": self.rank}))
        require_choice(self, "relative_to", self.relative_to, ("mean", "max", "absolute"))
        if self.decay > 1:
            raise ValueError(f"{type(self).__name__}: decay must be at most 1, not {self.decay!r}.")
        both = (self.left, self.right)
        powers = [power for power in both if is_number(power) and power != 0]
        if not powers or not all(is_number(power) and 0 <= power < math.inf for power in both):
            raise ValueError(
                f"{type(self).__name__}: left and right must be 0 or above, finite, and not both 0, not "
                f"{self.left!r} and {self.right!r}."
            )
        for power in powers:
            try:
                get_solver(self.solver, power)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: solver: {error}.") from None
        if self.refresh_every % self.stats_every:
            raise ValueError(
                f"{type(self).__name__}: refresh_every must be a multiple of stats_every "
                f"({self.stats_every}), not {self.refresh_every}: a root is made from its own batch too."
            )

    acts_at_step: ClassVar[bool] = True

    acts_alone: ClassVar[bool] = True

    cadence: str = "spread"

    paper_cadence: ClassVar[tuple[int, int]] = (1, 1)
    """The intervals ``stats_every`` and ``refresh_every`` of ``cadence="paper"``, where a rule has one."""

    def _set_cadence(self) -> None:
        require_choice(self, "cadence", self.cadence, ("spread", "paper"))
        if self.cadence == "spread":
            return
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        for name, value in zip(("stats_every", "refresh_every"), self.paper_cadence, strict=True):
            if getattr(self, name) not in (defaults[name], value):
                raise ValueError(f'{type(self).__name__}: cadence="paper" is {name}={value}: leave it out.')
            object.__setattr__(self, name, value)

    @property
    def refreshes_together(self) -> bool:  # type: ignore[override]
        """With the paper's cadence all layers refresh in the same step."""
        return self.cadence == "paper"

    # ---- in backward -------------------------------------------------------------------------

    def update(self, call: LinearCall) -> Update:
        """Return ``c · L^-p G R^-q`` with the roots in use; the plain gradient if the step preconditions."""
        if call.waits or not call.memory:
            return call.gradient()
        left, right = get_root(call.memory, "output"), get_root(call.memory, "input")
        return precondition_gradient(call, left, right, call.memory["scale"])

    def in_backward(self, memory: State, shape: LayerShape) -> bool:
        """Return whether each product is cheaper with the rows than with G, and c has been measured."""
        sides = self.list_powers(shape.outputs, shape.columns)
        limits = {"input": shape.outputs, "output": shape.columns}
        if self.cadence == "paper":
            return False  # c is measured in each step
        fewer = bool(sides) and bool(memory["rows"] < min(limits[side] for side in sides))
        return fewer and is_precise(float(memory["scale"]))

    def gather(self, call: LinearCall, turn: int) -> Evidence:
        """``AᵀA`` and ``ΔᵀΔ``, as far as they are needed; lower triangles."""
        sides = self.list_powers(call.outputs, call.columns)
        evidence = {"rows": torch.tensor(float(call.row_count), dtype=call.dtype, device=call.delta.device)}
        if "input" in sides:
            evidence["input"], rows = call.sampled_gram(call.dtype, self.sample, turn)
            evidence["rows"].fill_(rows)
        if "output" in sides:
            evidence["output"] = compute_lower_product(call.delta_rows().mT)
        for side in sides:
            _refuse_underflow(evidence[side], call, side)
        return evidence

    # ---- at the step -------------------------------------------------------------------------

    def learn(self, memory: State, evidence: Evidence) -> State:
        """Add to the discounted sums, and to the discounted counts that make means of them."""
        decay = self.decay
        counts = {"input": evidence["rows"].clone(), "output": torch.ones_like(evidence["rows"])}
        news = {"rows": evidence["rows"]}
        for side in ("input", "output"):
            if side not in evidence:
                continue
            for key, value in ((side, evidence[side]), (f"{side}.count", counts[side])):
                news[key] = value.add_(memory[key], alpha=decay) if key in memory else value
        return news

    def refresh(self, memory: State, name: str, health: Health) -> State:
        """Compute the roots of the statistics; keep the last good ones where that fails."""
        unknown = torch.full_like(memory["rows"], 0.0 if self.keep_norm else 1.0)  # c, until it is measured
        news = {"scale": memory.get("scale", unknown)}
        for side, power in (("input", self.right), ("output", self.left)):
            if side not in memory:
                continue
            statistic = memory[side]
            count = memory[f"{side}.count"] if self.statistic == "mean" else 1.0
            last, rank = get_root(memory, side), self.choose_rank(statistic.shape[1])
            note = partial(health.note, name)
            root: Root | None
            if rank is None:
                mean = statistic / count if self.statistic == "mean" else statistic
                root = compute_inverse_root(
                    mean, power, self.damping, self.relative_to, self.solver, note, memory["rows"]
                )
            else:
                start = last.vectors if isinstance(last, LowRankRoot) else None
                root = compute_low_rank_root(
                    statistic, power, self.damping, self.relative_to, rank, start, divisor=count
                )
            if root is None:
                root = last if last is not None else _identity(statistic, rank)
            news.update(_entries(side, root))
        return news

    def measure_residual(self, memory: State) -> Tensor | None:
        """``‖X^(1/p) (S + λI) v - v‖ / ‖v‖``, of the roots X in use and one vector v; the larger side's."""
        powers = {} if self.turns_steps else {"input": self.right, "output": self.left}
        found = [self._measure_side(memory, side, power) for side, power in powers.items() if power]
        known = [residual for residual in found if residual is not None]
        return torch.stack(known).max() if known else None

    def _measure_side(self, memory: State, side: str, power: float) -> Tensor | None:
        root, times = get_root(memory, side), round(1 / power)
        if root is None or self.relative_to == "max" or abs(times * power - 1) > 1e-9:
            return None  # the largest eigenvalue would cost more than all of this
        count = memory[f"{side}.count"] if self.statistic == "mean" else 1
        lower = memory[side].tril()
        diagonal = lower.diagonal(dim1=1, dim2=2) / count
        shift = self.damping * diagonal.mean(1, keepdim=True) if self.relative_to == "mean" else self.damping
        probe = torch.arange(lower.shape[1], device=lower.device, dtype=lower.dtype).cos()
        probe = probe.expand(lower.shape[0], 1, -1)
        row = (probe @ lower.mT + probe @ lower) / count  # S v, with the diagonal twice
        row += probe * (shift - diagonal).unsqueeze(1)
        for _ in range(times):
            row = multiply_by_root(row, root)
        return ((row - probe).norm(dim=(1, 2)) / probe.norm(dim=(1, 2))).max()

    def finish_stacked(self, memory: State, gradients: Tensor) -> tuple[Tensor, State]:
        """``L^-p G R^-q`` of the gradients at hand."""
        left, right = get_root(memory, "output"), get_root(memory, "input")
        if left is None and right is None:
            return gradients, {}
        matrices = gradients.flatten(0, 1)
        return _multiply_between(matrices, _flatten(left), _flatten(right)).reshape(gradients.shape), {}

    def measure_amplification(self, memory: State) -> Tensor | None:
        """Return the root mean square of the gains of ``L^-p`` and ``R^-q`` over all directions."""
        roots = [root for root in (get_root(memory, "output"), get_root(memory, "input")) if root is not None]
        if not roots:
            return None
        gains = torch.stack([measure_square_gain(root) for root in roots]).prod(0)  # (layers, groups)
        return gains.mean(1).sqrt()

    @property
    def keeps_norm(self) -> bool:
        """Whether c is measured."""
        return self.keep_norm

    # ---- sizes -------------------------------------------------------------------------------

    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """``AᵀA``, ``ΔᵀΔ`` and the number of rows."""
        return {"rows": (), **{side: (shape.groups, n, n) for side, n in self._sizes(shape).items()}}

    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """Return the discounted sums and counts."""
        sums = {side: (shape.groups, n, n) for side, n in self._sizes(shape).items()}
        return {"rows": (), **sums, **{f"{side}.count": () for side in sums}}

    def refreshed_shapes(self, shape: LayerShape) -> Shapes:
        """Return the roots, dense or of low rank, and c."""
        shapes: dict[str, tuple[int, ...]] = {"scale": ()}
        for side, n in self._sizes(shape).items():
            rank, g = self.choose_rank(n), shape.groups
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
            rank = self.choose_rank(n)
            cost += shape.groups * float(n * n * (n if rank is None else 2 * rank))
        return cost

    def _sizes(self, shape: LayerShape) -> dict[str, int]:
        sizes = {"input": shape.columns, "output": shape.outputs}
        return {side: sizes[side] for side in self.list_powers(shape.outputs, shape.columns)}

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Statistics, roots (as n³ or 2n²r) and products, shared out over the steps of a cycle."""
        sides = {
            side: (own, other)
            for side, own, other in (("input", size.d, size.m), ("output", size.m, size.d))
            if side in self.list_powers(size.m, size.d)
        }
        flops = floats = 0.0
        for n, other in sides.values():
            rank = self.choose_rank(n)
            flops += size.n / self.sample * n * n / (self.stats_every * self.slowdown)
            flops += float(n**3 if rank is None else 2 * n * n * rank) / (self.refresh_every * self.slowdown)
            flops += (2.0 * n if rank is None else 4.0 * rank) * n * min(size.n, other)
            floats += n * n + (n * n if rank is None else n * rank)
        return size.g * flops, size.g * floats

    def describe(self, size: Size | None) -> str:
        """Return the sides that are preconditioned, e.g. ``"L^-½ G R^-½"``."""
        name = type(self).__name__
        if size is None:
            return name
        sides = self.list_powers(size.m, size.d)
        left, right = (f"^-{power:g}" if power else "" for power in (self.left, self.right))
        text = f"{f'L{left} ' if 'output' in sides else ''}G{f' R{right}' if 'input' in sides else ''}"
        wanted = {side for side, power in (("input", self.right), ("output", self.left)) if power}
        missing = [
            f"{side} side larger than max_size={self.max_size}" for side in sorted(wanted - sides.keys())
        ]
        return f"{name}: {text}, every {self.refresh_every} steps" + "".join(f" ({text})" for text in missing)


def _refuse_underflow(gram: Tensor, call: LinearCall, side: str) -> None:
    """Make a Gram infinite that is below the range of its dtype, unless its rows are zero.

    So it is treated, and counted, as one that overflows. The root of zeros would be the identity.
    """
    count = call.row_count * gram.shape[1]
    lost = gram.diagonal(dim1=1, dim2=2).sum(1) < SAFE * torch.finfo(gram.dtype).tiny * count
    if lost.device.type == "cpu" and not bool(lost.any()):
        return  # on other devices, to look would be to wait
    if side == "output":
        moves = (call.delta_rows() != 0).flatten(1).any(1)
    elif not call.a.is_floating_point():
        return  # indices
    elif call.groups == 1:
        moves = (call.a != 0).any()
    else:
        moves = (call.map.sums(call.cast_input(call.dtype).abs()) != 0).any(1)
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(lost & moves, math.inf, 0.0).to(gram).unsqueeze(1))


def precondition_gradient(
    call: LinearCall, left: Root | None, right: Root | None, scale: Tensor | None = None
) -> Update:
    """``scale · left · G · right``, each product made with the rows where they are fewer than G's.

    Δ is in the dtype of solves: roots would amplify what half precision rounds.
    """
    delta = call.delta.to(call.dtype)
    call = replace(call, delta=delta if scale is None else delta * scale.to(delta.dtype))
    if left is not None and call.row_count < call.columns:
        call, left = (
            replace(call, delta=call.from_delta_rows(multiply_by_root(call.delta_rows(), left))),
            None,
        )
    is_product = call.map.rows_are_inputs and call.groups == 1
    if right is not None and is_product and call.row_count < call.outputs:
        rows, last = multiply_rows_by_root(
            call.a.reshape(-1, call.width).to(call.dtype), right, call.has_bias
        )
        delta = call.delta_rows()[0].T
        weight = (delta @ rows).reshape(call.weight.shape)
        move, right = Update(weight, None if last is None else delta @ last), None
    else:
        move = call.gradient()
    if left is None and right is None:
        return move
    return call.update(_multiply_between(call.matrix(move).to(call.dtype), left, right))


def _multiply_between(matrix: Tensor, left: Root | None, right: Root | None) -> Tensor:
    """``left · matrix · right``."""
    moved = matrix if right is None else multiply_by_root(matrix, right)
    return moved if left is None else multiply_by_root(moved.mT, left).mT


def _flatten(root: Root | None) -> Root | None:
    """Return the roots of layers of one shape, (layers, g, ...), as one of many groups."""
    if isinstance(root, LowRankRoot):
        return LowRankRoot(*(part.flatten(0, 1) for part in (root.vectors, root.weights, root.scale)))
    return None if root is None else root.flatten(0, 1)


def get_root(memory: State, side: str) -> Root | None:
    """Return the inverse root of a side's statistic that a layer remembers."""
    if f"{side}.root" in memory:
        return memory[f"{side}.root"]
    if f"{side}.vectors" in memory:
        return LowRankRoot(*(memory[f"{side}.{part}"] for part in ("vectors", "weights", "scale")))
    return None


def _entries(side: str, root: Root) -> dict[str, Tensor]:
    if isinstance(root, LowRankRoot):
        parts = {"vectors": root.vectors, "weights": root.weights, "scale": root.scale}
        return {f"{side}.{part}": value for part, value in parts.items()}
    return {f"{side}.root": root}


def _identity(like: Tensor, rank: int | None) -> Root:
    groups, size, _ = like.shape
    eye = torch.eye(size, dtype=like.dtype, device=like.device).expand(groups, size, size)
    if rank is None:
        return eye.clone()
    return LowRankRoot(eye[:, :, :rank].clone(), like.new_zeros(groups, rank), like.new_ones(groups))
