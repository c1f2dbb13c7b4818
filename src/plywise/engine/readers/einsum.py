"""Einsums of an input and a weight, and grouped products of tokens with experts."""

import string
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.layouts import make_permuted_layout
from plywise.engine.maps.matmul import TAPPED_PRODUCT, BatchedProduct
from plywise.engine.readers.common import Args, Kwargs, pick_argument, tap
from plywise.engine.readers.products import read_product


@lru_cache(maxsize=256)
def parse_einsum(equation: str, weight_place: int) -> tuple[str, str, str, str] | None:
    """Return the axes of a two-operand einsum that is a product with a weight.

    Returns:
        The letters of experts (in the weight, the input and the output), inputs (in the weight and the
        input), outputs (in the weight and the output), and rows (in the input and the output); None if the
        equation is no such product.
    """
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not (left + out).replace(",", "").isalpha():
        return None
    weight, x = terms[weight_place], terms[1 - weight_place]
    if any(len(set(term)) != len(term) for term in (weight, x, out)):
        return None
    experts = "".join(c for c in out if c in weight and c in x)
    inputs = "".join(c for c in weight if c in x and c not in out)
    outputs = "".join(c for c in out if c in weight and c not in x)
    rows = "".join(c for c in out if c in x and c not in weight)
    named = (experts, inputs, outputs, rows)
    if not inputs or not outputs or len(experts) > 1 or set(out) != set(experts + outputs + rows):
        return None
    if set(weight) != set(experts + inputs + outputs) or set(x) != set(experts + inputs + rows):
        return None
    return named


@lru_cache(maxsize=256)
def spell_out(equation: str, dims: tuple[int, ...]) -> str:
    """Return an einsum of two operands with its output named, and letters for ellipses.

    An ellipsis stands for the leading dimensions that the operands share, from the right, as in broadcasting.

    Args:
        equation: as the user has written it.
        dims: dimensions of the operands.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # then torch's order: the ellipsis, and the letters that occur once, sorted
        letters = left.replace(",", "").replace(".", "")
        out = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(terms) == 2:
        counts = [
            size - len(term) + 3 if "..." in term else 0 for size, term in zip(dims, terms, strict=True)
        ]
        free = [c for c in string.ascii_letters if c not in left + out][: max(counts)]
        named = [
            term.replace("...", "".join(free[len(free) - n :])) for term, n in zip(terms, counts, strict=True)
        ]
        terms, out = named, out.replace("...", "".join(free))
    return f"{','.join(terms)}->{out}"


def read_einsum(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``torch.einsum`` of an input and a weight, with or without experts."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if isinstance(args[0], str) and len(operands) == 2 and not kwargs:
        equation = spell_out(args[0], tuple(operand.dim() for operand in operands))
        output = capture_contraction(capture, equation, tuple(operands), partial(torch.einsum, equation))
        if output is not None:
            return output
    return func(*args, **kwargs)


def capture_contraction(
    capture: Capture,
    equation: str,
    operands: tuple[Tensor, ...],
    compute: Callable[..., Tensor],
    is_product: bool = False,
) -> Tensor | None:
    """Capture a product of an input and a weight that an einsum describes; None if it is no such product.

    Args:
        capture: the capture.
        equation: the einsum, with all axes named.
        operands: the input and the weight, in any order.
        compute: makes the output from the operands in that order.
        is_product: see `tap`.
    """
    for place in (1, 0):
        output = _capture_operand(capture, equation, operands, place, compute, is_product)
        if output is not None:
            return output
    return None


def _capture_operand(
    capture: Capture, equation: str, operands: Any, place: int, compute: Any, is_product: bool
) -> Tensor | None:
    weight, x = operands[place], operands[1 - place]
    axes = parse_einsum(equation, place)
    if axes is None or capture.is_parameter(x):
        return None
    experts, inputs, outputs, rows = axes
    terms, out = equation.partition("->")[0].split(","), equation.partition("->")[2]
    of_weight, of_x = terms[place], terms[1 - place]
    sizes = _measure_axes(of_x + of_weight, (*x.shape, *weight.shape))
    if sizes is None or len(of_x) != x.dim():
        return None
    order = tuple(of_weight.index(c) for c in experts + outputs + inputs)
    layout = make_permuted_layout(order, len(experts) + len(outputs))
    map_: LinearMap = BatchedProduct(sizes[experts], sends_below=False) if experts else TAPPED_PRODUCT
    site = capture.find_site(weight, map_, layout, None, x, by_role=False)
    if site is None:
        return None
    made = experts + rows + outputs
    flat_shape = (*(sizes[c] for c in experts), -1)

    def flatten(a: Tensor) -> Tensor:
        rows_first = a.permute([of_x.index(c) for c in experts + rows + inputs])
        return rows_first.reshape(*flat_shape, _count(sizes, inputs))

    def restore(below: Tensor) -> Tensor:
        named = experts + rows + inputs
        return below.reshape([sizes[c] for c in named]).permute([named.index(c) for c in of_x])

    def run(a: Tensor, stored: Tensor, bias: None) -> Tensor:
        output = compute(stored, a) if place == 0 else compute(a, stored)
        turned = output.permute([out.index(c) for c in made])
        return turned.reshape(*flat_shape, _count(sizes, outputs))

    output = tap(capture, site, run, flatten, x, weight, None, is_product, restore)
    return output.reshape([sizes[c] for c in made]).permute([made.index(c) for c in out])


def read_grouped_product(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.grouped_mm(x, weight, offs=ends)``: the rows of x up to ``ends[i]`` meet the i-th expert.

    Each expert is a call of its own, with its own rows. Reading ``ends`` waits for the device once.
    """
    x, weight = args[0], args[1]
    ends = pick_argument(args, kwargs, 2, "offs")
    plain = pick_argument(args, kwargs, 3, "bias") is None and kwargs.get("out_dtype") is None
    if not (plain and isinstance(ends, Tensor) and x.dim() == 2 and weight.dim() == 3):
        return func(*args, **kwargs)
    if not capture.is_parameter(weight):
        return func(*args, **kwargs)
    outputs, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            outputs.append(read_product(capture, torch.mm, (x[start:end], weight[expert]), {}))
            start = end
    if start < len(x):  # rows of no expert
        outputs.append(x.new_zeros(len(x) - start, weight.shape[2]))
    return torch.cat(outputs) if outputs else x.new_zeros(0, weight.shape[2])


def _measure_axes(letters: str, shape: tuple[int, ...]) -> dict[str, int] | None:
    """Return the size of each axis; None where torch says what is wrong, or repeats an axis of size 1."""
    sizes = dict(zip(letters, shape, strict=False))
    fits = len(letters) == len(shape) and all(sizes[c] == n for c, n in zip(letters, shape, strict=True))
    return sizes if fits else None


def _count(sizes: dict[str, int], letters: str) -> int:
    count = 1
    for letter in letters:
        count *= sizes[letter]
    return count
