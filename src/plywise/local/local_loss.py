"""Local losses: every block learns to classify by a small head of its own."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import make_part, require_whole
from plywise.data.batches import Batch
from plywise.data.models import find_mask
from plywise.data.training_data import cross_entropy as token_cross_entropy
from plywise.engine.capture.masked_rows import use_found_mask
from plywise.errors import BlockError, PlywiseError
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.component import Component, Signal
from plywise.local.heads import MakeHead, MeanLinear, mean_linear, pooled_linear, position_linear
from plywise.local.learner import OneWayLearner, PredictsByBlocks

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar from predictions and targets."""


class LossComponent(Component):
    """A block, and the loss of what its head makes of its output; without a head, of the output itself.

    Args:
        block: the block.
        loss: of scores and targets.
        head: the head.
        numbers: whether the last block hands on one number a sample, (N,), so that heads must do the same.
    """

    def __init__(
        self, block: nn.Module, loss: Loss, head: nn.Module | None = None, numbers: bool = False
    ) -> None:
        super().__init__()
        self.block = block
        self.head = head
        self._loss, self._numbers = loss, numbers

    def judge(self, s: Tensor, y: Tensor, carried: Batch = None) -> Tensor:
        """The loss of the block's output ``s``; padded positions count neither for heads nor for rules."""
        if self.head is None:
            return compute_loss(self._loss, s, y)
        mask = find_mask(carried)
        with nullcontext() if mask is None else use_found_mask(mask):
            scores = self.head(s, mask) if isinstance(self.head, MeanLinear) else self.head(s)
        return compute_loss(self._loss, scores.flatten() if self._numbers else scores, y)

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the block's output, and its loss."""
        s = signal.through(self.block)
        return replace(signal, s=s), self.measure_loss(s, signal.y, signal.carried)

    def measure_loss(self, s: Tensor, y: Tensor, carried: Batch = None) -> Tensor:
        """Return the loss of the block's output ``s``, which goes on to the next block.

        Raises:
            BlockError: the head changed it.
        """
        version = s._version
        loss = self.judge(s, y, carried)
        if s._version != version:
            raise BlockError(
                f"The head of a {type(self.block).__name__} changes the block's activations in place, and "
                "the next block would get them so. Make the head's first operation out of place."
            )
        return loss


def make_headed_components(
    blocks: Blocks, num_classes: int, make_head: MakeHead, loss: Loss
) -> list[LossComponent]:
    """A component for each block: all but the last have a head, with the block's dtype, where the block is.

    The default head becomes one at every position where the last block gives scores (T, C), and one of the
    mean over positions for other models that carry their inputs: they are transformers.

    Raises:
        BlockError: the last block's output is not a score for each class.
    """
    require_whole("The learner", num_classes=num_classes)
    shape = blocks.shapes[-1]
    if shape[:1] != (num_classes,) and not has_positions(shape, num_classes) and (shape or num_classes != 1):
        raise BlockError(
            f"The last block hands on {tuple(shape)} a sample, but its output is the prediction: "
            f"{describe_scores(num_classes)}. Put the classifier into the last block, or correct the "
            "number of classes."
        )
    if loss is F.cross_entropy and num_classes == 1:
        raise BlockError(
            "The cross-entropy of a single score is 0 whatever the score. For two classes let the last block "
            "hand on two scores; for numbers give a loss, such as torch.nn.functional.mse_loss."
        )
    if make_head is pooled_linear and (blocks.carries or has_positions(shape, num_classes)):
        make_head = position_linear if has_positions(shape, num_classes) else mean_linear
    components, like = [], None
    for block, shape in zip(blocks[:-1], blocks.shapes[1:-1], strict=True):
        like = next((p for p in block.parameters() if p.is_floating_point()), like)
        head = make_part("head or projection", make_head, shape, num_classes, kind=nn.Module)
        head = head if like is None else head.to(like)
        components.append(LossComponent(block, loss, head, numbers=not blocks.shapes[-1]))
    return [*components, LossComponent(blocks[-1], loss)]


def require_scores(blocks: Blocks, loss: Loss) -> None:
    """Raise BlockError unless the last block gives what cross entropy takes, if that is the loss."""
    if loss is F.cross_entropy and len(blocks.shapes[-1]) != 1:
        raise BlockError(
            f"The last block hands on {tuple(blocks.shapes[-1])} a sample, but its output is the prediction: "
            "one score for each class. Put the classifier into the last block."
        )


def describe_scores(num_classes: int) -> str:
    """Describe in words the prediction for so many classes; regression has one output of one number."""
    return "one number" if num_classes == 1 else f"one score for each of {num_classes} classes"


def has_positions(shape: torch.Size, num_classes: int) -> bool:
    """Return whether an output has scores for each position, (T, C)."""
    return len(shape) == 2 and shape[-1] == num_classes != shape[0]


def choose_loss(owner: object, loss: Loss, shape: torch.Size, num_classes: int) -> Loss:
    """Return the loss of the last block's output: the default one over all positions where it has some.

    Raises:
        TypeError: see `require_loss`.
    """
    require_loss(owner, loss)
    is_default = loss is F.cross_entropy and has_positions(shape, num_classes)
    return token_cross_entropy if is_default else loss


def refuse_positions(owner: object, loss: Loss, shape: torch.Size, num_classes: int) -> None:
    """Raise BlockError if the last block hands on scores at each position, and the loss takes no tokens."""
    if loss is F.cross_entropy and has_positions(shape, num_classes):
        raise BlockError(
            f"{type(owner).__name__} classifies samples, and the last block hands on scores at each "
            f"position, {tuple(shape)} a sample. Average the positions in the last block, or take LocalLoss, "
            "Interlocking or LocalNextToken, which learn tokens."
        )


def require_loss(owner: object, loss: object) -> None:
    """Raise TypeError unless ``loss`` is a function, or a module without parameters: nobody trains them."""
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise TypeError(
            f"{type(owner).__name__}: the loss, a {type(loss).__name__}, has parameters, and all components "
            "would train them at once. Put them into a block, and give a loss without parameters."
        )
    if not callable(loss):
        raise TypeError(
            f"{type(owner).__name__}: loss must be a function of scores and targets, such as "
            f"torch.nn.functional.mse_loss; an object of type {type(loss).__name__} was given."
        )


def compute_loss(loss: Loss, scores: Tensor, y: Tensor) -> Tensor:
    """Compute a loss.

    Raises:
        PlywiseError: it is not a scalar with a graph, which backward needs.
    """
    value = loss(scores, y)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise PlywiseError(
            f"The loss must be one number in a tensor, and of scores {tuple(scores.shape)} and targets "
            f"{tuple(y.shape)} it is {found}. Take the mean over all samples, in torch's losses by "
            'reduction="mean", and return a tensor, without item().'
        )
    if scores.requires_grad and not value.requires_grad:
        raise PlywiseError(
            "The loss does not depend on the scores by a graph, so that nothing would be learned. Compute it "
            "by operations of torch, without detach() or item()."
        )
    return value.reshape(())


class LocalLoss(PredictsByBlocks, OneWayLearner):
    """Training block by block, each by a loss of its own.

    Idea: a small head on each block's activations predicts the target. The block learns, with its head, from
        the loss of this prediction, and no gradient crosses from one block to another.
    Equation: s_i = f_i(s_{i-1}) with s_{i-1} detached; block i and head h_i follow ∇ ℓ(h_i(s_i), y), the
        last block ∇ ℓ(s_K, y). Prediction: f_K ∘ … ∘ f_1; heads are for training only. One block is
        backpropagation.
    Use when: memory is short, or you train blocks in a pipeline of processes, and there are few blocks; or as
        the baseline of other local methods.
    Do not use when: backpropagation fits and accuracy matters. Early blocks discard what their own head does
        not need, and the loss grows with the number of blocks: see `Interlocking`.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, those of heads too. The last block's output is one score for each class.
    Cost: a head for each block. The activations of one block at a time.
    Status: variant: blocks learn all at once, as in the second paper's synchronous algorithm; the default
        head, average pooling and one linear layer, is smaller than theirs.
    Source: Belilovsky, Eickenberg, Oyallon, "Greedy layerwise learning can scale to ImageNet", ICML 2019,
        arXiv 1812.11446; simultaneous training: "Decoupled greedy learning of CNNs", ICML 2020, arXiv
        1901.08164.
    Code: eugenium/layerCNN, eugenium/DGL.
    Results: the authors' code notes about 88.3, 90.4 and 91.7 % on CIFAR-10, with auxiliary problems of 1, 2
        and 3 hidden layers. Not reproduced here at that size. Ours: 93.3 against backpropagation's 94.1 % on
        10,000 images of MNIST (MLP), 48.5 against 50.0 % on 3,000 of CIFAR-10 (four blocks), and 38.8 against
        51.6 % on 10,000 with eight blocks of one convolution each, where `MonoForward`, whose heads see all
        positions and vote, has 54.7. With 16 blocks `LocalLoss` takes 0.27 of backpropagation's memory
        (benchmarks/README.md).
    Limits: the default head wants channels first (`pooled_linear`). The loss must have no parameters.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        head: makes a head from the shape of a sample's activations and C. Default `pooled_linear`; for scores
            (T, C) of positions `position_linear`, for other transformers that were cut by `split`
            `mean_linear`.
        loss: of scores and targets, a scalar. With the default, cross-entropy, targets are class indices, or
            tokens (N, T) for scores (N, T, C), -100 ignored, and are checked; another loss gets them as they
            are: squared errors of numbers, or binary cross-entropy of several labels.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the last block does not hand on a score for each class, or a head changes activations
            in place.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> body, top = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.LocalLoss(pw.Blocks([body, top], x), num_classes=3, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> (losses[-1] < losses[0] / 2).tolist()
        [True, True]
        >>> learner.predict(x).shape
        torch.Size([32, 3])
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        head: MakeHead = pooled_linear,
        loss: Loss = F.cross_entropy,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        loss = choose_loss(self, loss, blocks.shapes[-1], num_classes)
        self._blocks, self._classes, self._loss = blocks, num_classes, loss
        super().__init__(make_headed_components(blocks, num_classes, head, loss), **training)
