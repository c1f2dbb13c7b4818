"""Turns layers into other coordinates: small ones in stacks of one shape, large ones in pieces of their rows.

In each step, gradients are turned before the optimizer's step, and its steps are turned back afterwards. All
memory for that, and all views of it, are kept between steps. A large layer is cut into pieces that fit into a
processor's cache, so that its matrices are read from main memory only once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plywise.engine.contract import LayerShape, State, StatefulContract, Turn
from plywise.engine.coordinates.slots import Slots
from plywise.engine.finite import is_finite, is_precise
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.stacks import LARGEST_STACKED, StackedState
from plywise.numerics.norms import compute_norm, compute_row_norms

ALIGNED = 16
"""Rows of pieces begin at multiples of so many numbers: products take up to twice as long otherwise."""

Note = Callable[[LayerHandle], None]
"""A function that is called with each layer whose turned matrix is not finite."""

FindFactors = Callable[[list[Tensor]], list[float]]
"""A function that returns the factors by which the optimizer's weight decay will multiply parameters."""


class SmallLayers:
    """Small layers on one device and of one dtype, stacked by shape.

    Args:
        rule: the rule.
        stacks: layers of one shape each.
        places: where they are in the list of all layers.
        states: the states of all layers.
    """

    def __init__(
        self,
        rule: StatefulContract,
        stacks: list[list[LayerHandle]],
        places: list[list[int]],
        states: Sequence[State],
    ) -> None:
        self._rule = rule
        self._places = places
        self.layers = [layer for stack in stacks for layer in stack]
        self._slots = Slots(self.layers)
        self._owners = [i for i, layer in enumerate(self.layers) for _ in layer.trained]
        shapes = [stack[0].shape for stack in stacks]
        sizes = [
            len(stack) * shape.groups * shape.outputs * shape.columns
            for stack, shape in zip(stacks, shapes, strict=True)
        ]
        weight, dtype = self.layers[0].weight, shapes[0].dtype
        self._input, self._output = (weight.new_empty(sum(sizes), dtype=dtype) for _ in range(2))
        self._base = weight.new_empty(sum(sizes), dtype=weight.dtype)
        self._norms = self._input.new_empty(2, len(self.layers))
        flats = zip(*(flat.split(sizes) for flat in (self._input, self._output, self._base)), strict=True)
        norms = self._norms.split([len(stack) for stack in stacks], 1)
        self._stacks = [_SmallStack(*parts) for parts in zip(stacks, shapes, flats, norms, strict=True)]
        self._input_parts, self._output_parts, self._base_parts = (
            [part for stack in self._stacks for part in stack.parts[place]] for place in range(3)
        )
        self._rows = [row for stack in self._stacks for row in stack.output_rows.unbind()]
        self._failed: set[int] = set()
        self.follow(states)

    def follow(self, states: Sequence[State]) -> None:
        """Use these as the states of all layers from now on."""
        for stack, places in zip(self._stacks, self._places, strict=True):
            own = [states[place] for place in places]
            if not stack.state.holds(own):
                turn = self._rule.make_turn(stack.state.follow(own))
                assert turn is not None
                stack.turn = turn

    def turn(self, find_factors: FindFactors, note: Note) -> None:
        """Turn gradients, and keep the weights that a weight decay alone would make."""
        slots = self._slots
        parameters, gradients = slots.find_parameters(), slots.find_gradients()
        torch._foreach_copy_(self._input_parts, slots.read(gradients))
        for stack in self._stacks:
            stack.turn.turn(stack.input, stack.output)
        turned = self._output_parts
        self._failed = self._find_failed(torch.linalg.vector_norm(self._output), note)
        if self._failed:  # they stay as they are
            turned = self._replace(turned, slots.read(gradients))
        slots.write(gradients, turned)
        torch._foreach_copy_(self._base_parts, slots.read(parameters))
        factors = find_factors(parameters)
        if factors.count(factors[0]) < len(factors):
            torch._foreach_mul_(self._base_parts, factors)
        elif factors[0] != 1.0:
            self._base.mul_(factors[0])

    def turn_back(self, note: Note) -> None:
        """Turn the optimizer's steps back, and put them into the weights."""
        slots = self._slots
        parameters = slots.find_parameters()
        torch._foreach_copy_(self._input_parts, slots.read(parameters))
        self._input.sub_(self._base)
        for stack in self._stacks:
            stack.norms[0].copy_(compute_row_norms(stack.input_rows))
            stack.turn.turn_back(stack.input, stack.output)
            stack.norms[1].copy_(compute_row_norms(stack.output_rows))
        before, after = self._norms.tolist()
        if not math.isfinite(sum(after)):
            for i in self._find_failed(math.inf, note):  # such a step is not taken
                self._rows[i].zero_()
        if self._rule.keeps_norm:
            if not all(map(is_precise, (*before, *after))):
                torch._foreach_copy_(self._input_parts, slots.read(parameters))  # it has been overwritten
                self._input.sub_(self._base)
                before = [measure(row) for stack in self._stacks for row in stack.input_rows]
                after = list(map(measure, self._rows))
            torch._foreach_mul_(self._rows, [find_scale(*norms) for norms in zip(before, after, strict=True)])
        self._base.add_(self._output)
        ends = self._base_parts
        if self._failed:  # the optimizer has seen their plain gradients
            ends = self._replace(ends, slots.read([parameter.clone() for parameter in parameters]))
        slots.write(parameters, ends)

    def _find_failed(self, norm: Tensor | float, note: Note) -> set[int]:
        """Return the layers whose matrices are not finite; none if the norm of all is finite."""
        if math.isfinite(norm):
            return set()
        failed = {i for i, row in enumerate(self._rows) if not is_finite(row)}
        for i in failed:
            note(self.layers[i])
        return failed

    def _replace(self, parts: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        """Return each layer's parts; if its gradient could not be turned, return those given instead."""
        both = zip(self._owners, parts, others, strict=True)
        return [other if i in self._failed else part for i, part, other in both]


class _SmallStack:
    """Layers of one shape, whose matrices are parts of longer tensors.

    Attributes:
        state: the layers' states, stacked.
        turn: their coordinates.
        input: what is turned, (n, m, k) with n = layers · groups.
        output: what has been turned.
        input_rows: `input` as a row for each layer; and so is `output_rows`.
        parts: each layer's weight and bias in `input`, in `output` and in the bases.
        norms: (2, layers), of `input` and of `output`.
    """

    def __init__(
        self, layers: list[LayerHandle], shape: LayerShape, flats: tuple[Tensor, ...], norms: Tensor
    ) -> None:
        self.state = StackedState()
        self.turn: Turn
        sizes = len(layers), shape.groups, shape.outputs, shape.columns
        self.input, self.output = (flat.view(-1, *sizes[2:]) for flat in flats[:2])
        self.input_rows, self.output_rows = (flat.view(len(layers), -1) for flat in flats[:2])
        self.norms = norms.unbind()
        weight = layers[0].make_canonical(layers[0].weight.detach())
        self.parts = [_list_parts(flat.view(sizes), weight) for flat in flats]


class LargeLayer:
    """A layer whose matrix is turned in pieces of its rows.

    Args:
        rule: the rule.
        layer: the layer.
        place: where it is in the list of all layers.
        states: the states of all layers.
        memory: the memory of a piece, by its sizes; layers of the same sizes share it.
    """

    def __init__(
        self,
        rule: StatefulContract,
        layer: LayerHandle,
        place: int,
        states: Sequence[State],
        memory: "dict[object, _Piece]",
    ) -> None:
        self._rule = rule
        self._place = place
        self.layers = [layer]
        self._slots = Slots(self.layers)
        self._state = StackedState()
        self.follow(states)
        shape = layer.shape
        self._sizes = shape.groups * shape.outputs, shape.columns - (layer.bias is not None)
        cut = shape.groups == 1 and self._turn.keeps_rows_apart and shape.device.type == "cpu"
        count = -(-shape.outputs * shape.columns // LARGEST_STACKED) if cut else 1
        self._length = -(-self._sizes[0] // count)
        weight = layer.weight
        self._base = [weight.new_empty(self._sizes), weight.new_empty(self._sizes[0])][: len(layer.trained)]
        self._pieces = []
        for begin in range(0, self._sizes[0], self._length):
            rows = min(self._length, self._sizes[0] - begin)
            key = rows, shape
            if key not in memory:
                memory[key] = _Piece(weight, replace(shape, outputs=rows // shape.groups), self._sizes[1])
            self._pieces.append(memory[key])
        self._has_failed = False

    def follow(self, states: Sequence[State]) -> None:
        """Use these as the states of all layers from now on."""
        own = [states[self._place]]
        if not self._state.holds(own):
            turn = self._rule.make_turn(self._state.follow(own))
            assert turn is not None
            self._turn = turn

    def turn(self, find_factors: FindFactors, note: Note) -> None:
        """Turn the gradient, and keep the weights that a weight decay alone would make."""
        parameters, gradients = self._slots.find_parameters(), self._slots.find_gradients()
        parts = self._read(gradients)
        cut = self._cut(parts)
        self._has_failed = False
        for i, (piece, rows) in enumerate(zip(self._pieces, cut, strict=True)):
            torch._foreach_copy_(piece.input_parts, rows)
            self._turn.turn(piece.input, piece.output)
            if is_finite(piece.output_memory):
                torch._foreach_copy_(rows, piece.output_parts)
            else:  # the gradient stays as it is
                self._has_failed = True
                note(self.layers[0])
                for done, before in zip(self._pieces[:i], cut, strict=False):
                    torch._foreach_copy_(done.input_parts, before)
                    done.output.copy_(self._turn.solve(done.input))
                    torch._foreach_copy_(before, done.output_parts)
                break
        self._write(gradients, parts)
        factors = find_factors(parameters)
        for base, part, factor in zip(self._base, self._read(parameters), factors, strict=True):
            torch.mul(part, factor, out=base)

    def turn_back(self, note: Note) -> None:
        """Turn the optimizer's step back, and put it into the weight."""
        if self._has_failed:
            return
        parameters = self._slots.find_parameters()
        parts = self._read(parameters)
        try:
            scale = self._turn_pieces_back(parts)
        except BaseException:
            torch._foreach_copy_(parts, self._base)
            raise
        if scale is None:  # such a step is not taken
            note(self.layers[0])
            torch._foreach_copy_(parts, self._base)
        else:
            for base, part in zip(self._base, parts, strict=True):
                torch.add(base, part, alpha=scale, out=part)
        self._write(parameters, parts)

    def _turn_pieces_back(self, parts: list[Tensor]) -> float | None:
        """Turn steps back, and put them in the place of the weights.

        Returns:
            The factor that keeps the step's norm; None if the step is not finite.
        """
        befores, afters = [], []
        for piece, rows, base in zip(self._pieces, self._cut(parts), self._cut(self._base), strict=True):
            for into, row, old in zip(piece.input_parts, rows, base, strict=True):
                torch.sub(row, old, out=into)
            befores.append(measure(piece.input_memory))
            self._turn.turn_back(piece.input, piece.output)
            afters.append(measure(piece.output_memory))
            torch._foreach_copy_(rows, piece.output_parts)
        before, after = math.hypot(*befores), math.hypot(*afters)
        if not math.isfinite(after) and not all(map(is_finite, parts)):
            return None
        return find_scale(before, after) if self._rule.keeps_norm else 1.0

    def _read(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the weight as a matrix, and the bias; copies if the weight is stored in another order."""
        weight, *bias = self._slots.read(tensors)
        return [weight.reshape(self._sizes), *bias]

    def _write(self, tensors: list[Tensor], parts: list[Tensor]) -> None:
        """Write back what `_read` has returned, if that was a copy."""
        if parts[0].untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            canonical = self.layers[0].make_canonical(tensors[0]).shape
            self._slots.write(tensors, [parts[0].view(canonical), *parts[1:]])

    def _cut(self, parts: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the rows of each piece."""
        return list(zip(*(part.split(self._length) for part in parts), strict=True))


class _Piece:
    """Memory for some rows of a layer's matrix, and for what is made of them.

    Attributes:
        input: (g, m, k); each row begins at an even address.
        output: the same.
        input_memory: the memory of `input`, with zeros between its rows; and so is `output_memory`.
        input_parts: the columns of the weight, and that of the bias; and so are `output_parts`.
    """

    def __init__(self, like: Tensor, shape: LayerShape, width: int) -> None:
        columns = -(-shape.columns // ALIGNED) * ALIGNED
        sizes = 2, shape.groups, shape.outputs, columns
        memory = like.new_zeros(sizes, dtype=shape.dtype)
        self.input_memory, self.output_memory = memory.unbind()
        self.input, self.output = memory[..., : shape.columns].unbind()
        self.input_parts, self.output_parts = (
            [flat[:, :width], *flat[:, width : shape.columns].unbind(1)]
            for flat in memory.view(2, shape.groups * shape.outputs, columns).unbind()
        )


def _list_parts(matrices: Tensor, weight: Tensor) -> list[Tensor]:
    """List each layer's columns of weight and bias in matrices (layers, g, m, k), in the weight's shape."""
    width = weight[0].numel()
    parts = []
    for matrix in matrices:
        parts.append(matrix[..., :width].view(weight.shape))
        if matrix.shape[-1] > width:
            parts.append(matrix[..., -1].view(-1))
    return parts


def measure(tensor: Tensor) -> float:
    """Return the Frobenius norm of a tensor."""
    norm = float(compute_norm(tensor))
    return norm if is_precise(norm) else float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def find_scale(before: float, after: float) -> float:
    """Return the factor that gives a step the norm that it had before it was turned back."""
    return before / after if 0 < after < math.inf and before < math.inf else 1.0


def arrange_turned(
    rule: StatefulContract, layers: Sequence[LayerHandle], states: Sequence[State]
) -> list[SmallLayers | LargeLayer]:
    """Put small layers into stacks, those of one device and dtype together; the others stay by themselves.

    Layers that the rule does not turn are left out, and so are those that fully_shard has spread.
    """
    alike: dict[object, dict[object, list[int]]] = {}
    large: list[SmallLayers | LargeLayer] = []
    memory: dict[object, _Piece] = {}
    for place, (layer, state) in enumerate(zip(layers, states, strict=True)):
        if layer.entry.sharding is not None or rule.make_turn(StackedState().follow([state])) is None:
            continue
        weight = layer.weight
        sizes = {key: value.shape for key, value in state.items()}
        if weight.numel() > LARGEST_STACKED:
            large.append(LargeLayer(rule, layer, place, states, memory))
            continue
        canonical = layer.make_canonical(weight.detach()).shape
        stack = canonical, layer.shape, max(map(math.prod, sizes.values())) > LARGEST_STACKED and place
        kind = weight.device, weight.dtype, layer.is_plain
        alike.setdefault(kind, {}).setdefault((stack, tuple(sizes.items())), []).append(place)
    small = [
        SmallLayers(rule, [[layers[place] for place in places] for places in stacks], stacks, states)
        for stacks in (list(by_shape.values()) for by_shape in alike.values())
    ]
    return [*small, *large]
