"""Turns plain gradients into updates at the optimizer's step, all layers of one shape in one call.

Otherwise Python would take most of the time of many small layers. Small layers of one shape are stacked, and
what all stacks need (copies, norms, the check for NaN) is done for all of them in one call.
"""

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from plywise.engine.call import Update
from plywise.engine.contract import State, StatefulContract
from plywise.engine.finite import is_precise, measure_norms
from plywise.engine.health import IDENTITY, ROUNDING, Health
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.learning import ALLOWED_ROUNDING
from plywise.engine.statistics.stacks import Scratch, Stack, StackedState, arrange, list_parts, make_signature

SHORTEST_SUM, LONGEST_SUM, OF_PRODUCTS = 16, 512, 2.0
"""Sums so long round gradients, and products with them, by up to ``2 √length u ‖G‖``.

Of random rows errors were 0.3 to 10 ``u ‖G‖``, and up to 40 where 300 columns of the inputs were equal.
Longer sums are made of blocks.
"""

SHORTEST_OF_ROWS = 4
"""Gradients alone are rounded by up to ``√length u ‖G‖``, by sums over at least so many rows."""

OF_HALF, ALLOWED_OF_HALF = 0.29, 4.0
"""How much half precision changes a gradient that is rounded to it, and how much an update may change.

Both are in units of the dtype's eps. 0.2 to 0.3 was measured; rounding errors are evenly distributed.
"""


class StepUpdates:
    """Turns the plain gradients of layers into updates.

    Args:
        rule: the rule.
        health: where updates that are not finite are counted.
    """

    def __init__(self, rule: StatefulContract, health: Health) -> None:
        self._rule = rule
        self._scratch = Scratch()
        self._health = health
        self._layers: list[LayerHandle] = []
        # weakly: a parameter's hooks own the attachment, and torch hides that from the garbage collector
        self._parameters: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor] | None, object]] = []
        self._small: list[list[Stack]] = []
        self._large: dict[int, StackedState] = {}

    def make(self, layers: Sequence[LayerHandle], memories: dict[str, State]) -> None:
        """Replace these layers' gradients by updates, and write the changes into their states.

        A gradient whose update is not finite stays as it is.
        """
        layers = [layer for layer in layers if memories[layer.name] and layer.has_gradient]
        if not layers:
            return
        gradients = self._read_again(layers)
        if gradients is None:
            gradients = [layer.read_gradient() for layer in layers]
            self._arrange(layers, gradients, memories)
        for stacks in self._small:
            self._make_at_once(stacks, layers, gradients, memories)
        for place, state in self._large.items():
            # a stack that is not kept: its matrices would double the model
            stack = Stack([place], gradients[place], layers[place].groups, self._scratch, state)
            self._make_at_once([stack], layers, gradients, memories)

    def _read_again(self, layers: Sequence[LayerHandle]) -> list[Update] | None:
        """Return the gradients if these are the layers of the last step, with known parameters; else None."""
        if layers != self._layers:
            return None
        gradients = []
        for layer, (weight, bias, signature) in zip(layers, self._parameters, strict=True):
            tensors = [None if ref is None else ref() for ref in (weight, bias)]
            if layer.bias is not tensors[1]:  # frozen or thawed since
                return None
            parts = [None if tensor is None else layer.find_gradient(tensor) for tensor in tensors]
            if parts[0] is None or (bias is not None and parts[1] is None):
                return None
            gradient = Update(*parts)
            if make_signature(gradient) != signature:
                return None
            gradients.append(gradient)
        return gradients

    def _arrange(
        self, layers: list[LayerHandle], gradients: list[Update], memories: dict[str, State]
    ) -> None:
        groups, states = [layer.groups for layer in layers], [memories[layer.name] for layer in layers]
        self._small, large = arrange(gradients, groups, states)
        self._large = {place: StackedState() for place in large}
        are_plain = all(layer.gradient_is_plain for layer in layers)
        self._layers = layers if are_plain else []
        self._parameters = [
            (
                weakref.ref(layer.weight),
                None if layer.bias is None else weakref.ref(layer.bias),
                make_signature(gradient),
            )
            for layer, gradient in zip(layers, gradients, strict=True)
        ]

    def _make_at_once(
        self,
        stacks: list[Stack],
        layers: Sequence[LayerHandle],
        gradients: Sequence[Update],
        memories: dict[str, State],
        dtype: torch.dtype | None = None,
    ) -> None:
        places = [place for stack in stacks for place in stack.places]
        views = [view for stack in stacks for view in stack.views]
        torch._foreach_copy_(
            [part for view in views for part in list_parts(view)],
            [part for place in places for part in list_parts(gradients[place])],
        )
        moved, news = [], []
        for stack in stacks:
            states = [memories[layers[place].name] for place in stack.places]
            update, changed = self._finish(stack, states, dtype)
            moved.append(update)
            news += [{key: value[i] for key, value in changed.items()} for i in range(len(update))]
        norms, sizes, scales = self._put_back(stacks, moved, dtype)
        wanted = sizes if self._rule.keeps_norm else []
        if dtype is None and not _is_in_range(wanted, norms, [gradients[place] for place in places]):
            self._make_at_once(stacks, layers, gradients, memories, torch.float64)
            return
        if scales is not None:
            news = [new | {"scale": scale} for new, scale in zip(news, scales, strict=True)]
        lossy = self._find_lossy(stacks, layers, gradients, sizes, norms, dtype)
        lengths = sizes if self._rule.keeps_norm else norms
        made = [
            (layers[place], gradients[place], view, new, length)
            for place, view, new, length in zip(places, views, news, lengths, strict=True)
            if place not in lossy
        ]
        self._deliver(made, memories)
        if lossy:
            again = [stack for stack in stacks if lossy.intersection(stack.places)]
            self._make_at_once(again, layers, gradients, memories, torch.float64)

    def _finish(self, stack: Stack, states: list[State], dtype: torch.dtype | None) -> tuple[Tensor, State]:
        """Let the rule make a stack's updates, in a wider dtype if one is given."""
        state: State = stack.state.follow(states)
        if dtype is None:
            return self._rule.finish_stacked(state, stack.matrices)
        state = {key: value.to(dtype) for key, value in state.items()}
        return self._rule.finish_stacked(state, stack.matrices.to(dtype))

    def _deliver(
        self,
        made: Sequence[tuple[LayerHandle, Update, Update, State, float]],
        memories: dict[str, State],
    ) -> None:
        """Replace gradients by updates, and write the changes into states, where the update is finite.

        Args:
            made: the layers, each with its gradient, its update, what changes in its state, and the update's
                norm.
            memories: the states by name.
        """
        targets, sources = [], []
        for layer, gradient, view, new, norm in made:
            if not _can_hold(gradient, view, norm):
                self._health.note(layer.name, IDENTITY)
                continue
            if new:
                memories[layer.name] = {**memories[layer.name], **new}
            if layer.gradient_is_plain:
                targets += list_parts(gradient)
                sources += list_parts(view)
            else:
                layer.write_gradient(view)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _put_back(
        self, stacks: list[Stack], moved: list[Tensor], dtype: torch.dtype | None
    ) -> tuple[list[float], list[float], Sequence[Tensor] | None]:
        """Put the updates into the stacks, with the norms of the gradients if the rule keeps them.

        Returns:
            The norms of the updates before that; those of the gradients, if they are needed; and what the
            updates were multiplied by (0, for unknown, if the statistics' dtype cannot hold it), None if the
            rule does not keep norms.
        """
        parts = [part for update in moved for part in update.unbind()]
        count = len(parts)
        if self._rule.keeps_norm or any(stack.state.derive(self._read_amplifications) for stack in stacks):
            parts += [part for stack in stacks for part in stack.matrices.unbind()]
        found = measure_norms(parts, dtype)
        if not self._rule.keeps_norm:
            self._copy_into(stacks, moved, None)
            numbers = found.tolist()
            return numbers[:count], numbers[count:], None
        norms, before = found[:count], found[count:]
        kept = torch.cat([stack.state["scale"] for stack in stacks])
        scales = torch.where(norms > 0, before / norms, kept.to(found.dtype))  # zeros leave c open
        self._copy_into(stacks, moved, scales)
        scales = scales.to(kept.dtype)
        if dtype is not None:
            scales = torch.where(scales.isfinite(), scales, 0)
        numbers = found.tolist()  # read from the device at once
        return numbers[:count], numbers[count:], scales.unbind()

    def _read_amplifications(self, state: State) -> list[float]:
        """Return what `StatefulContract.measure_amplification` says; nothing if it is not known."""
        found = self._rule.measure_amplification(state)
        return [] if found is None else found.tolist()

    def _find_lossy(
        self,
        stacks: list[Stack],
        layers: Sequence[LayerHandle],
        gradients: Sequence[Update],
        sizes: list[float],
        norms: list[float],
        dtype: torch.dtype | None,
    ) -> set[int]:
        """Find stacks whose products may have changed an update by much; return the places of their layers.

        What gradients have lost is counted, in the end: float64 does not repair it.
        """
        start, lossy = 0, set()
        for stack in stacks:
            bound, found, float64_helps = _bound_rounding(stack, dtype), [], False
            for i, amplification in enumerate(stack.state.derive(self._read_amplifications), start):
                place, allowed, lost = stack.places[i - start], ALLOWED_ROUNDING, bound * sizes[i]
                if halves := _find_half_precision(gradients[place], layers[place]):
                    lost, allowed = _bound_rounding_to_half(gradients[place], halves, sizes[i])
                if norms[i] and allowed < lost * amplification / norms[i] < math.inf:
                    found.append(layers[place].name)
                    rest = _bound_rounding(stack, torch.float64) * sizes[i]
                    float64_helps |= not halves and rest * amplification / norms[i] <= allowed
            if dtype is None and float64_helps and _has_float64(stack):
                lossy.update(stack.places)
            else:
                for name in found:
                    self._health.note(name, ROUNDING)
            start += len(stack.places)
        return lossy

    def _copy_into(self, stacks: list[Stack], moved: list[Tensor], scales: Tensor | None) -> None:
        """Put updates into stacks, multiplied by the layers' scales if there are any."""
        if scales is None:
            for stack, update in zip(stacks, moved, strict=True):
                if update.data_ptr() != stack.matrices.data_ptr():
                    stack.matrices.copy_(update)
            return
        for stack, update, scale in zip(stacks, moved, scales.split([len(m) for m in moved]), strict=True):
            if update.dtype == stack.matrices.dtype:
                torch.mul(update, scale.to(update.dtype)[:, None, None, None], out=stack.matrices)
            else:
                stack.matrices.copy_(update * scale[:, None, None, None])


def _can_hold(gradient: Update, update: Update, norm: float) -> bool:
    """Return whether an update of this norm is finite, also in the dtype of the gradient."""
    assert gradient.weight is not None
    largest = torch.finfo(gradient.weight.dtype).max
    return norm <= largest or all(bool((part.abs() <= largest).all()) for part in list_parts(update))


def _bound_rounding(stack: Stack, dtype: torch.dtype | None) -> float:
    """Bound the errors of gradients, and of products with them in a dtype, relative to their norms."""
    shape, times = stack.matrices.shape, OF_PRODUCTS
    longest = max(SHORTEST_SUM, *shape[2:])
    if dtype is not None and "rows" in stack.state:  # only the sums over rows have been rounded
        longest, times = max(SHORTEST_OF_ROWS, float(stack.state["rows"].max())), 1.0
    return times * min(longest, LONGEST_SUM) ** 0.5 * float(torch.finfo(stack.matrices.dtype).eps) / 2


def _has_float64(stack: Stack) -> bool:
    """Return whether the products can be made in a wider dtype."""
    return stack.matrices.dtype != torch.float64 and stack.matrices.device.type != "mps"


def _find_half_precision(gradient: Update, layer: LayerHandle) -> list[torch.dtype]:
    """Return the dtypes of half precision in which a gradient is stored, or was made (under autocast)."""
    found = [part.dtype for part in list_parts(gradient)[:1]]
    if layer.gradient_dtype is not None:
        found.append(layer.gradient_dtype)
    return [dtype for dtype in found if dtype.itemsize < 4]


def _bound_rounding_to_half(gradient: Update, halves: list[torch.dtype], size: float) -> tuple[float, float]:
    """Bound the error of a gradient of this norm that is rounded to half precision, and what is allowed."""
    eps, weight = max(torch.finfo(dtype).eps for dtype in halves), list_parts(gradient)[0]
    unit = torch.finfo(weight.dtype)
    least = unit.smallest_normal * unit.eps * weight.numel() ** 0.5  # of subnormal numbers
    return OF_HALF * max(eps * size, least), ALLOWED_OF_HALF * eps


def _is_in_range(sizes: list[float], norms: list[float], gradients: list[Update]) -> bool:
    """Return whether float32 was wide enough for the updates, and for norms to divide by.

    Args:
        sizes: norms of gradients; none if the rule does not keep them.
        norms: norms of what these became.
        gradients: the gradients.
    """
    for i, (norm, gradient) in enumerate(zip(norms, gradients, strict=True)):
        size = sizes[i] if sizes else norm
        if size == norm == 0:
            if any(bool(part.any()) for part in list_parts(gradient)):
                return False
        elif sizes and not (is_precise(size) and is_precise(norm)):
            return False
    return True
