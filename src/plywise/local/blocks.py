"""A network as a chain of blocks, each of which passes one tensor to the next."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor, nn

from plywise._util.checks import describe_kind, is_list
from plywise._util.modes import evaluating
from plywise.data.batches import Batch, clone_batch, count_samples, list_tensors
from plywise.data.models import find_mask
from plywise.errors import BlockError
from plywise.local.component import Signal


class Blocks(Sequence[nn.Module]):
    """A sequence of modules, and the shapes of their outputs.

    Args:
        modules: the blocks, first to last. They are not copied: training changes these modules.
        example: a small batch of inputs; one forward finds the shapes (and materialises lazy layers). It is
            made in eval mode and on a copy, so that buffers and inputs stay as they are.

    Attributes:
        shapes: of one sample: the input's, then each block's output.
        carries: whether the blocks take the model's inputs beside the signal. `split` makes such blocks from
            a model whose forward calls its layers in a loop. The inputs may then be tensors in any nesting.

    Raises:
        BlockError: there is no block, or something else than modules is given; or a block fails on its input,
            does not return one tensor with a row for each sample, or shares a parameter with another block.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> body, head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> Blocks([body, head], torch.randn(4, 8)).shapes
        (torch.Size([8]), torch.Size([16]), torch.Size([3]))
    """

    def __init__(self, modules: Iterable[nn.Module], example: Batch) -> None:
        self._modules = _list_modules(modules)
        if not self._modules:
            raise BlockError("There is no block: give at least one module.")
        _refuse_sharing(self._modules)
        if not list_tensors(example):
            raise BlockError(
                f"Blocks needs a small batch of inputs, with a tensor in it, not {describe_kind(example)}: "
                "plywise.Blocks([first, second], x)."
            )
        self.carries = any(getattr(module, "carries", False) for module in self._modules)
        signal = self.begin(clone_batch(example), torch.empty(0))
        shapes, value = [signal.s.shape[1:]], signal.s
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for number, module in enumerate(self._modules):
                with evaluating(module):
                    value = _output(module, number, replace(signal, s=value), count_samples(example))
                shapes.append(value.shape[1:])
        self.shapes = tuple(shapes)

    def begin(self, x: Batch, y: Tensor) -> Signal:
        """Return the first block's input: the model's inputs, with their first tensor if they are carried."""
        return Signal(list_tensors(x)[0], y, carried=x) if self.carries else Signal(x, y)

    def refuse_carrying(self, learner: str, why: str) -> None:
        """Raise BlockError if these blocks carry a model's inputs, and the learner takes no such: ``why``."""
        if self.carries:
            raise BlockError(
                f"{learner} takes blocks of one tensor, and these carry the model's inputs along: {why}. "
                "Take LocalLoss, LocalNextToken or Interlocking."
            )

    def as_module(self) -> nn.Module:
        """Return the blocks, one after another, as a module that takes the model's inputs."""
        return chain_blocks(self)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[nn.Module, ...]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | tuple[nn.Module, ...]:
        return self._modules[index]

    def __len__(self) -> int:
        return len(self._modules)


def require_blocks(owner: object, blocks: object) -> None:
    """Raise BlockError unless ``blocks`` is a `Blocks`, which knows the shapes that a learner needs."""
    if not isinstance(blocks, Blocks):
        raise BlockError(
            f"{type(owner).__name__} takes plywise.Blocks; an object of type {type(blocks).__name__} was "
            "given. Cut a model by plywise.split(model, 4, x), or give modules in a row by "
            "plywise.Blocks([first, second], x); x is a small batch of inputs."
        )


class Chain(nn.Module):
    """Blocks that carry the model's inputs along, one after another."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Batch) -> Tensor:
        """Return what the last block hands on."""
        (last,) = deque(run_blocks(self.blocks, x), maxlen=1)  # earlier signals are not kept
        return last


def chain_blocks(blocks: Iterable[nn.Module]) -> nn.Module:
    """Blocks one after another, as a module that takes the model's inputs."""
    modules = list(blocks)
    is_carrying = any(getattr(module, "carries", False) for module in modules)
    return Chain(modules) if is_carrying else nn.Sequential(*modules)


def run_blocks(blocks: Iterable[nn.Module], x: Batch) -> Iterator[Tensor]:
    """Return the outputs of all blocks on a batch; blocks that carry get the batch beside the signal."""
    s = x
    for number, block in enumerate(blocks):
        if getattr(block, "carries", False):
            s = block(list_tensors(x)[0] if number == 0 else s, x)
        else:
            s = block(s)
        yield s


def hide_padding(s: Tensor, carried: Batch) -> Tensor:
    """Set activations at padded positions to zero, if the model's inputs have a mask of them.

    Then the padding's content does not matter to a head that flattens positions.
    """
    mask = find_mask(carried)
    if mask is None or mask.shape != s.shape[:2]:
        return s
    return s * mask.to(s).reshape(*mask.shape, *(1 for _ in s.shape[2:]))


def _list_modules(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the modules in a row; raise BlockError if something else was given in their place."""
    found: tuple[object, ...] = tuple(modules) if is_list(modules) else (modules,)
    wrong = [item for item in found if not isinstance(item, nn.Module)]
    if wrong or not is_list(modules):
        given = (wrong or [modules])[0]
        raise BlockError(
            f"Blocks takes modules in a row; an object of type {type(given).__name__} was given. Write "
            "plywise.Blocks([first, second], x), x a small batch of inputs, or cut a whole model by "
            "plywise.split(model, 4, x)."
        )
    return tuple(item for item in found if isinstance(item, nn.Module))


def _refuse_sharing(modules: tuple[nn.Module, ...]) -> None:
    owner: dict[nn.Parameter, tuple[int, str]] = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            first, other = owner.setdefault(parameter, (number, name))
            if first != number:
                raise BlockError(
                    f"Block {number} shares its {name!r} with the {other!r} of block {first}: two blocks "
                    "would train one parameter. Keep both uses in one block."
                )


def _output(module: nn.Module, number: int, signal: Signal, samples: int) -> Tensor:
    name, value = f"Block {number} ({type(module).__name__})", signal.s
    try:
        output = signal.through(module)
    except Exception as error:
        before = "and at the block before" if number else "which is that of the model's inputs"
        raise BlockError(
            f"{name} fails on the {tuple(value.shape)} that it gets: {error}. Look at the example's shape, "
            f"{before}."
        ) from error
    if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != samples:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BlockError(
            f"{name} hands on {found} for {samples} samples; blocks hand on one tensor with a row a sample."
        )
    return output
