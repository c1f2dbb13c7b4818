"""What a learner does to parameters, seen from outside: its optimizers' gradients in each step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

import plywise as pw


class Recorded:
    """Makes plain SGD optimizers, and keeps the gradients with which each parameter was last stepped."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate
        self.gradients: dict[Tensor, Tensor | None] = {}

    def __call__(self, groups) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=self.rate)
        optimizer.register_step_pre_hook(self._keep)
        return optimizer

    def _keep(self, optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.gradients[p] = None if p.grad is None else p.grad.clone()

    def of(self, modules: Iterable[nn.Module]) -> list[Tensor | None]:
        """The gradients of these modules' parameters, in order."""
        return [self.gradients[p] for module in modules for p in module.parameters()]


def moves(make, modules, x: Tensor, y: Tensor, **settings) -> list[Tensor | None]:
    """The gradients of ``modules`` in the first step of the learner that ``make(blocks, ...)`` makes."""
    recorded = Recorded()
    make(pw.Blocks(modules, x), optimizer=recorded, **settings).step(x, y)
    return recorded.of(modules)


def backprop(modules, loss, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradients of the whole chain by one plain backward."""
    parameters = [p for module in modules for p in module.parameters()]
    return list(torch.autograd.grad(loss(nn.Sequential(*modules)(x), y), parameters))


def same_bits(found, wanted) -> bool:
    return len(found) == len(wanted) and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def relative(found, wanted) -> float:
    """Largest relative error over a list of tensors."""
    pairs = zip(found, wanted, strict=True)
    return max(((f - w).norm() / w.norm()).item() for f, w in pairs)


def tanh_blocks(widths=(5, 7, 6, 8, 3)) -> list[nn.Module]:
    """A chain of float64 blocks, one for each pair of widths; the last is linear."""
    pairs = list(pairwise(widths))
    blocks = [nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in pairs[:-1]]
    return [block.double() for block in (*blocks, nn.Linear(*pairs[-1]))]


def conv_blocks() -> list[nn.Module]:
    """Blocks with batch norm and dropout, two that begin in place, and one without parameters; float64."""
    blocks = (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(6, 8)),
        nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3)),
    )
    return [block.double() for block in blocks]


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    """Inputs, and three classes that can be read off them."""
    x = torch.randn(*shape, dtype=torch.float64)
    return x, x.flatten(1)[:, :3].argmax(1)


@contextmanager
def counting_forwards(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """How often each module runs inside the block."""
    counts = dict.fromkeys(modules, 0)

    def count(module, args, output) -> None:
        counts[module] += 1

    handles = [module.register_forward_hook(count) for module in counts]
    yield counts
    for handle in handles:
        handle.remove()
