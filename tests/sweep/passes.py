"""One forward and backward pass, and how two of them differ."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
"""What rounding may do to a gradient, relative to the model's largest one."""


class UnusableError(Exception):
    """Plain torch cannot run this; the text is the reason that is counted."""


@dataclass
class Pass:
    """What a pass gives: outputs, gradients of parameters by name, gradients of the inputs."""

    outputs: list[Tensor]
    parameters: dict[str, Tensor | None]
    inputs: dict[str, Tensor | None]


def run_pass(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    *,
    change: Callable[[Tensor], Tensor] = torch.clone,
    seed: int = 14,
) -> Pass:
    """Forward and backward on copies of the arguments; buffers are set back, random numbers drawn alike.

    Args:
        model: what is run.
        args: its positional arguments.
        kwargs: its keyword arguments.
        change: makes the copy of a tensor among the arguments and of the gradient at an output.
        seed: of the random numbers that the model draws.
    """
    args, kwargs = copy_tensors((args, kwargs), change)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.zero_grad()
    with seeded(seed), quiet():
        outputs = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        kept = [output.detach().clone() for output in outputs]
        send_back(outputs, change)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    parameters = {name: copy_gradient(p) for name, p in model.named_parameters()}
    leaves = {str(i): leaf for i, leaf in enumerate(tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)}
    return Pass(kept, parameters, {f"input {i}": copy_gradient(leaf) for i, leaf in leaves.items()})


def send_back(outputs: list[Tensor], change: Callable[[Tensor], Tensor] = torch.clone) -> None:
    """Backward from random gradients at all outputs that have one."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs:
        raise UnusableError("no output has a gradient")
    generator = torch.Generator().manual_seed(15)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, [change(weight) for weight in weights])


def copy_tensors(tree: Any, change: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """The same tree with each tensor copied (and changed) once, as a leaf of its own."""
    made: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = change(value.detach()).detach().requires_grad_(value.requires_grad)
        return made[id(value)]

    return tree_map(copy, tree)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from this seed; afterwards they go on as if nothing had been drawn."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: torch's modules warn of settings that its list of inputs tries on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copy_gradient(leaf: Tensor) -> Tensor | None:
    return None if leaf.grad is None else leaf.grad.detach().clone()


def is_finite(result: Pass) -> bool:
    tensors = [*result.outputs, *result.parameters.values(), *result.inputs.values()]
    return all(t is None or not t.is_floating_point() or bool(t.isfinite().all()) for t in tensors)


def same_bits(one: Tensor | None, two: Tensor | None) -> bool:
    """Both absent, or equal in every entry (NaN equals NaN)."""
    if one is None or two is None:
        return one is two
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one, two) or bool(((one == two) | (one.isnan() & two.isnan())).all())


def find_difference(got: Pass, plain: Pass, rounded: set[str] | None = None) -> str | None:
    """The first gradient that differs from the plain one, in words; None if all agree.

    Args:
        got: the pass to judge.
        plain: the same pass by plain autograd.
        rounded: names of gradients that may differ by rounding; others must agree to the last bit.
    """
    gradients = {**plain.parameters, **plain.inputs}
    largest = max((float(g.abs().max()) for g in gradients.values() if has_entries(g)), default=0.0)
    for name, want in gradients.items():
        have = got.parameters[name] if name in got.parameters else got.inputs[name]
        rounding = ROUNDING.get(want.dtype, 1e-5) if want is not None else 0.0
        tolerance = rounding * largest if rounded is not None and name in rounded else 0.0
        problem = describe_difference(have, want, tolerance)
        if problem:
            return f"{name}: {problem}"
    return None


def has_entries(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 0


def describe_difference(have: Tensor | None, want: Tensor | None, tolerance: float) -> str | None:
    """How ``have`` differs from ``want`` by more than ``tolerance``, or None."""
    if same_bits(have, want):
        return None
    if have is None or want is None:
        return f"{'no gradient' if have is None else 'a gradient'}, unlike plain autograd"
    if have.dtype != want.dtype or have.shape != want.shape:
        return f"{have.dtype} {tuple(have.shape)}, plain {want.dtype} {tuple(want.shape)}"
    error = float((have - want).abs().max())
    if error <= tolerance:
        return None
    size = max(float(want.abs().max()), 1e-300)
    return f"differs from plain autograd by {error / size:.0e} of its largest entry"
