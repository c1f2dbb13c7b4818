"""Rows that do not count: padded positions and ignored targets stay out of a rule's statistics.

`rows(mask)` surrounds a forward. Each call that is captured in it remembers the masks (a node of autograd's
graph is made in the forward, while its backward may run anywhere), and in backward the rule sees the call
without the rows that its mask leaves out.
"""

import fnmatch
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from plywise.engine.call import LinearCall
from plywise.engine.maps.base import thin_axes
from plywise.errors import PlywiseError

LEFT_OUT = "rows that the mask leaves out have a gradient"
"""Event of a layer whose masked rows are reached by the loss."""

UNUSED_BLOCKS = 3
"""After so many blocks whose mask no call has used, a warning says so."""


@dataclass(frozen=True, eq=False)
class RowMask:
    """Which rows count.

    Attributes:
        mask: true where a row counts, (N,), (N, T), ...
        layers: patterns of the names of layers that it is for; empty for all.
        block: what stands for the user's own block that it was given to; None if plywise made it.
    """

    mask: Tensor
    layers: tuple[str, ...] = ()
    block: object = None

    @cached_property
    def kept(self) -> Tensor:
        """Places of the rows that count among all, in order."""
        return self.mask.reshape(-1).nonzero().squeeze(1)

    @cached_property
    def samples(self) -> int:
        """Samples, along the first dimension, with a row that counts."""
        return int(self.mask.reshape(len(self.mask), -1).any(1).sum())

    @cached_property
    def transposed(self) -> "RowMask":
        """The mask for calls inside of which batch and positions are exchanged."""
        return replace(self, mask=self.mask.transpose(0, 1)) if self.mask.dim() > 1 else self

    def fits(self, name: str) -> bool:
        """Return whether the mask is for a layer of this name."""
        return not self.layers or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)


class _Active(threading.local):
    masks: tuple[RowMask, ...] = ()


_active = _Active()


@contextmanager
def rows(mask: Tensor, *, layers: str | Sequence[str] | None = None) -> Iterator[None]:
    """Keep rows out of the statistics of every rule in this forward: padded positions, ignored targets.

    A rule then updates a layer as if these rows were not in the batch. Rows count where a layer's input is of
    shape ``(*mask.shape, ...)``, or has the same rows flattened into one dimension; inputs of other shapes (a
    pooled token) keep all their rows. `explain` says for each layer how many rows have counted. Attention
    with ``batch_first`` exchanges batch and positions inside, and there the mask is exchanged, too.
    Convolutions take masks of samples, (N,), only; experts take none.

    The plain gradient of a masked row should be zero, because the loss should not depend on padding. If it is
    not zero, a rule of one batch leaves it out of the update and warns once; a rule with memory keeps it,
    since only its statistics come from rows. Use masks of ignored targets only for layers above which
    positions no longer mix, and name these layers with ``layers``.

    Masks may be nested: a call uses the innermost one that is for its layer and has its shape. If no call
    uses the masks of three blocks, a warning says so. The backward may run outside of the block. A checkpoint
    with ``use_reentrant=True`` runs calls again in backward: then put the backward into the block, too.

    Args:
        mask: true (or not 0) where a row counts: (N,) for samples, (N, T) for positions, in the order of the
            model's own dimensions.
        layers: names of the layers to which it applies, with wildcards as in ``"decoder.*"``. Default all.

    Raises:
        PlywiseError: the mask has no dimension.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Linear(3, 2)
        >>> rule = pw.ProxProp().attach(model)
        >>> x = torch.randn(4, 5, 3)
        >>> mask = torch.arange(5) < torch.tensor([[5], [3], [2], [5]])
        >>> with pw.rows(mask):
        ...     loss = model(x)[mask].square().mean()
        >>> loss.backward()
        >>> rule.detach()
    """
    if not isinstance(mask, Tensor) or mask.dim() == 0:
        raise PlywiseError("A mask of rows is a tensor of shape (N,), (N, T), ..., true where a row counts.")
    patterns = (layers,) if isinstance(layers, str) else tuple(layers or ())
    with _activate(RowMask(mask.detach() != 0, patterns, object())):
        yield


def use_found_mask(mask: Tensor) -> AbstractContextManager[None]:
    """Do as `rows` does for a mask that plywise found in a batch: it need not fit any layer."""
    return _activate(RowMask(mask.detach() != 0))


@contextmanager
def _activate(mask: RowMask) -> Iterator[None]:
    before = _active.masks
    _active.masks = (*before, mask)
    try:
        yield
    finally:
        _active.masks = before


def get_active_masks() -> tuple[RowMask, ...]:
    """Return the masks around the forward that runs in this thread, the innermost last."""
    return _active.masks


@contextmanager
def transpose_masks(query: Any, module: nn.Module | None) -> Iterator[None]:
    """Transpose masks in the block to (T, N), as `nn.MultiheadAttention` transposes a batch-first input."""
    before = _active.masks
    if not before or not isinstance(query, Tensor) or query.dim() != 3:
        yield
        return
    batch_first = getattr(module, "batch_first", None)

    def turn(one: RowMask) -> RowMask:
        exchanged = query.shape[:2] != one.mask.shape[:2] if batch_first is None else batch_first
        return one.transposed if exchanged else one

    _active.masks = tuple(map(turn, before))
    try:
        yield
    finally:
        _active.masks = before


@dataclass(frozen=True)
class KeptRows:
    """The rows of one call that count.

    Attributes:
        mask: which.
        axes: how many leading dimensions of the call's input and output they lie in.
    """

    mask: RowMask
    axes: int

    @property
    def places(self) -> Tensor:
        """Places of the rows that count."""
        return self.mask.kept

    def take(self, tensor: Tensor) -> Tensor:
        """Return the rows that count, (n, ...)."""
        return self._flatten(tensor).index_select(0, self.places.to(tensor.device))

    def put(self, whole: Tensor, kept: Tensor) -> Tensor:
        """Return a copy of ``whole`` with these rows in it."""
        flat = self._flatten(whole).clone(memory_format=torch.contiguous_format)
        return flat.index_copy_(0, self.places.to(whole.device), kept.to(whole)).reshape(whole.shape)

    def _flatten(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, *tensor.shape[self.axes :])

    def keep(self, call: LinearCall) -> LinearCall:
        """Return the call without the rows that do not count."""
        is_whole = self.axes == self.mask.mask.dim()
        return replace(
            call,
            a=self.take(call.a),
            delta=self.take(call.delta),
            samples=self.mask.samples if is_whole else len(self.places),
            thin=partial(self.thin, call.a) if is_whole and self.axes > 1 else None,
        )

    def thin(self, a: Tensor, every: int, turn: int) -> Tensor:
        """Return the rows that count among about every ``every``-th position along each axis."""
        slices = (slice(None), *thin_axes(a.shape[1:-1], every, turn))
        mask = self.mask.mask[slices[: self.axes]].to(a.device)
        return self._flatten(a[slices])[mask.reshape(-1)]

    def has_left_out(self, delta: Tensor) -> bool:
        """Return whether a row that does not count has a gradient."""
        return bool(self.put(delta, torch.zeros_like(self.take(delta))).any())


def find_kept(node: Any, delta: Tensor, a: Tensor | None = None) -> KeptRows | None:
    """Return the rows that count by the innermost mask for this call; None if there is no such mask.

    Args:
        node: the captured call's node of autograd's graph.
        delta: the gradient at its output.
        a: its map's input, if it is at hand.
    """
    site = node.site
    for mask in reversed(node.masks):
        if mask.fits(site.name):
            for axes, shape in ((mask.mask.dim(), mask.mask.shape), (1, (mask.mask.numel(),))):
                is_like = delta.shape[:axes] == shape and (a is None or a.shape[:axes] == shape)
                if is_like and axes <= site.map.row_axes(delta):
                    return KeptRows(mask, axes)
    return None


class LeftOutRows:
    """Says once if a mask keeps rows with a gradient out of updates."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self._note = note
        self._checked: set[str] = set()
        self._is_said = False

    def check(self, name: str, kept: KeptRows, delta: Tensor) -> None:
        """Look at a layer's first masked backward."""
        if name in self._checked:
            return
        self._checked.add(name)
        if not kept.has_left_out(delta):
            return
        self._note(name, LEFT_OUT)
        if not self._is_said:
            self._is_said = True
            warnings.warn(
                f"Layer {name!r}: the loss reaches rows that plywise.rows leaves out, and their gradient is "
                "not in its update. Mask only what the loss does not reach, or say by rows(mask, layers=...) "
                "which layers a mask is for.",
                RuntimeWarning,
                stacklevel=2,
            )


class UnusedMasks:
    """Says once if no call uses the masks that the user gives: a wrong shape, or a wrong name of a layer."""

    def __init__(self) -> None:
        self._blocks: list[object] = []
        self._is_over = False

    def check(self, name: str, masks: Sequence[RowMask], is_used: bool, delta: Tensor) -> None:
        """Look at a call in a block of masks.

        Args:
            name: the call's layer.
            masks: those around its forward.
            is_used: whether it uses one of them.
            delta: the gradient at its output.
        """
        self._is_over |= is_used
        mask = masks[-1]
        if self._is_over or mask.block is None or mask.block in self._blocks:
            return
        self._blocks.append(mask.block)
        if len(self._blocks) <= UNUSED_BLOCKS:  # calls of a block that come later may use its mask
            return
        self._is_over = True
        which = f" for layers={', '.join(mask.layers)}" if mask.layers else ""
        warnings.warn(
            f"No layer has used the masks of {UNUSED_BLOCKS} blocks of plywise.rows, so all rows count: a "
            f"mask is of shape {tuple(mask.mask.shape)}{which}, and the output of layer {name!r} is of shape "
            f"{tuple(delta.shape)}. A mask has the shape of a layer's rows, (N,) or (N, T).",
            RuntimeWarning,
            stacklevel=2,
        )
