"""Cascaded Forward: random blocks that never learn, each with a linear head; the heads' scores are added."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.checks import make_part, require_whole
from plywise._util.modes import evaluating
from plywise.data.batches import Batch, clone_batch, list_tensors
from plywise.errors import NonFiniteError, PlywiseError
from plywise.local.blocks import Blocks, hide_padding, require_blocks, run_blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner, check_classes
from plywise.local.linear_heads import GradientHead, LinearHead, RidgeHead
from plywise.local.trainer import MakeOptimizer

__all__ = ["CascadedForward", "GradientHead", "LinearHead", "RidgeHead", "cafo_blocks"]

MakeLinearHead = Callable[[torch.Size, int], LinearHead]
"""Makes a head from the shape of a sample's features and the number of classes."""


def cafo_blocks(channels: int, count: int = 3) -> list[nn.Sequential]:
    """Return the paper's blocks: convolution 3×3, ReLU, max pool 2, batch norm; 32, 128, 512 channels ...

    Batch norm's running statistics are plain means over all training batches (``momentum=None``), so that
    they belong to the data from the first batch on.

    Args:
        channels: channels of the images.
        count: number of blocks; each halves the image and, from the second on, has four times the channels.

    Example:
        >>> [tuple(block[0].weight.shape) for block in cafo_blocks(3)]
        [(32, 3, 3, 3), (128, 32, 3, 3), (512, 128, 3, 3)]
    """
    return [
        nn.Sequential(
            nn.Conv2d(below, above, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(above, eps=1e-4, momentum=None),
        )
        for below, above in pairwise([channels, *(32 * 4**number for number in range(count))])
    ]


class CascadedComponent(Component):
    """A block that never learns, and the head that reads it."""

    def __init__(self, block: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.block = block
        self.head = head

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the block's features, made as they are for prediction, and the head's loss.

        In training, the batch first updates the running statistics of the block's batch norms. Then the
        features are computed in eval mode, with the statistics of all training batches so far.
        """
        with torch.no_grad():
            if self.training and any(True for _ in self.block.buffers()):
                copy = replace(signal, s=clone_batch(signal.s))  # the block may change it in place
                copy.through(self.block)
            with evaluating(self.block):
                features = signal.through(self.block)
        _require_finite(features, f"features of a {type(self.block).__name__}")
        read = hide_padding(features, signal.carried)
        loss = self.head.loss(read, signal.y)
        if self.training:
            self.head.take_in(read, signal.y)
        return replace(signal, s=features), loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the head's alone."""
        return [{"params": list(self.head.parameters())}]


def no_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    """Return what stands for an optimizer where every head learns in closed form."""
    raise PlywiseError(
        "A head of CascadedForward learns by gradient and needs an optimizer: give one, for example "
        "optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-3, eps=1e-4)."
    )


class CascadedForward(OneWayLearner):
    """The Cascaded Forward algorithm (CaFo).

    Idea: random blocks already make good features. Keep them fixed and learn only a linear classifier on each
        block's features, by least squares or by gradient.
    Equation: F_i = f_i(F_{i-1}), f_i never trained; (F_iᵀF_i + λI) W_i = F_iᵀY with sums over the training
        batches, or W_i by cross-entropy. Prediction: Σ_i softmax(F_i W_i).
    Use when: you need a classifier after one pass over the data, without a rate to tune; or a baseline.
    Do not use when: accuracy matters: learned features are far better. The authors' code notes 65 % on
        CIFAR-10 for the least squares.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules: nothing in it is
        trained. Blocks end before the classifier. A ``rule`` handles each `GradientHead`; a `RidgeHead` has
        nothing for it.
    Cost: no backward pass. One forward of each block in a step, two where it has batch norm. A `RidgeHead`
        on d features adds d²/2 products a sample in float64, 8d² bytes, and a solve of d³/3 now and then.
    Status: variant: the ridge, its sums over batches and the running statistics are ours. The authors' code
        solves without a ridge and normalises training data as one batch, test data by the test batch. Its
        full-batch and sparsemax heads are not here; `GradientHead` is its linear layer on Adam.
    Source: Zhao, Wang, Li, Jin, Lang, Ling, "The Cascaded Forward Algorithm for Neural Network Training",
        2023, arXiv 2303.09728.
    Code: Graph-ZKY/CaFo.
    Results: the authors' code notes test errors on CIFAR-10 of 0.349 (least squares), 0.326 (cross-entropy)
        and 0.337 (sparsemax). Not reproduced here at that size. Ours: 83.5 % (ridge) and 86.9 % (gradient)
        against backpropagation's 94.1 % on 10,000 images of MNIST, 52.1 and 47.7 against 50.0 % on 3,000 of
        CIFAR-10; on eight random convolutions 48.9 % (ridge) and 46.5 % (gradient) against 51.6 % on 10,000
        of CIFAR-10, at 0.29 of the memory (benchmarks/README.md).
    Limits: the sum is not always better than its best block. Batch norm's statistics change while the heads
        learn: a batch is normalised by all batches so far. So the sums of a ridge head mix features of
        slightly different scales; the difference shrinks with the number of batches. Apart from this, a
        second epoch over the same data does not change a ridge head. Batch norm of flat features refuses a
        batch of one row. Each process of a data-parallel run has sums of its own.

    Args:
        blocks: the random blocks, for example `cafo_blocks`. Their parameters are not trained.
        num_classes: number of classes, C.
        head: makes a head from the shape of a sample's features and C: `RidgeHead`, the default, or
            `GradientHead`; ``functools.partial(RidgeHead, ridge=0.1)`` for other settings (tune
            its ridge in 1e-5 to 1).
        optimizer: makes the optimizer of each `GradientHead`; a `RidgeHead` needs none.
        **training: what else every `Learner` takes, by name. ``scheduler`` makes one for each optimizer, to
            step after each step. ``rule`` makes one to act inside each component, such as ``pw.Foof``;
            default none, plain gradients. ``callbacks`` are called with a `Report` after each step. ``seed``
            is of the components' random numbers (dropout, noise); default 0.

    Raises:
        BlockError: a block has too many features for a `RidgeHead`.
        NonFiniteError: at a step, the batch is not finite; no head has learned from it.
        PlywiseError: heads learn by gradient, and there is no optimizer.
        ValueError: there is no class.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(96, 8), torch.arange(96) % 3
        >>> x[torch.arange(96), y] += 4
        >>> layers = [nn.Sequential(nn.Linear(n, 32), nn.ReLU()) for n in (8, 32)]
        >>> learner = pw.CascadedForward(pw.Blocks(layers, x), num_classes=3)
        >>> for batch in range(0, 96, 32):
        ...     _ = learner.step(x[batch : batch + 32], y[batch : batch + 32])
        >>> bool((learner.predict(x).argmax(1) == y).float().mean() > 0.9)
        True
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        head: MakeLinearHead = RidgeHead,
        optimizer: MakeOptimizer = no_optimizer,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_whole(self, num_classes=num_classes)
        self._blocks, self._classes = blocks, num_classes
        self._components = []
        anywhere = [p for block in blocks for p in block.parameters()]
        for block, shape in zip(blocks, blocks.shapes[1:], strict=True):
            reader = make_part("CascadedForward: head", head, shape, num_classes, kind=LinearHead)  # type: ignore[type-abstract]
            like = next((p for p in (*block.parameters(), *anywhere) if p.is_floating_point()), None)
            if like is not None:
                reader.fit_to(like)
            self._components.append(CascadedComponent(block, reader))
        super().__init__(self._components, optimizer=optimizer, **training)

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return the batch, if it is finite: NaN would stay in sums and statistics for ever."""
        check_classes(y, self._classes)
        for tensor in list_tensors(x):
            _require_finite(tensor, "inputs")
        return self._blocks.begin(x, y)

    def as_module(self, depth: int | None = None) -> nn.Module:
        """The sum over the first ``depth`` blocks, or all; ridge heads with the weights of this moment."""
        return CascadedPath(self._components[:depth])


class CascadedPath(nn.Module):
    """``Σ_i softmax(F_i W_i)``: scores of the classes."""

    def __init__(self, components: list[CascadedComponent]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(component.block for component in components)
        self.heads = nn.ModuleList(component.head.as_module() for component in components)

    def forward(self, x: Batch) -> Tensor:
        """Scores (N, C); a row's sum is the number of blocks."""
        features = run_blocks(self.blocks, x)
        return torch.stack(
            [head(hide_padding(s, x)).softmax(1) for s, head in zip(features, self.heads, strict=True)]
        ).sum(0)


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"CascadedForward: {what} hold NaN or infinity, and would stay in the sums for good; the head "
            "has not learned from them. Look at the batch."
        )
