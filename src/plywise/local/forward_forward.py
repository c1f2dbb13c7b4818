"""Forward-Forward: every block learns large activations for right labels and small ones for wrong labels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import require_positive, require_whole
from plywise.errors import DataError, PlywiseError
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner, check_classes

PutLabel = Callable[[Tensor, Tensor, int], Tensor]
"""Puts labels into inputs: inputs (N, ...), a class for each and the number of classes, to inputs."""

EPS = 1e-8


def write_label(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Write the label into the first C numbers of an input, which should be empty, as Hinton did for MNIST.

    They are 0, and the label's own is the largest number of the input.

    Raises:
        DataError: an input has fewer than C numbers.

    Example:
        >>> write_label(torch.tensor([[0.1, 0.2, 0.3, 5.0]]), torch.tensor([1]), num_classes=2)
        tensor([[0.0000, 5.0000, 0.3000, 5.0000]])
    """
    rows = x.flatten(1).clone()
    if rows.shape[1] < num_classes:
        raise DataError(
            f"A label of {num_classes} classes does not fit into inputs of {rows.shape[1]} numbers a sample. "
            "Append numbers to the inputs, or give ForwardForward another function by put=."
        )
    rows[:, :num_classes] = F.one_hot(y, num_classes) * rows.amax(1, keepdim=True)
    return rows.view_as(x)


def goodness(s: Tensor) -> Tensor:
    """Mean square of each sample's activations, (N,).

    Example:
        >>> goodness(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
        tensor([5., 2.])
    """
    return s.flatten(1).square().mean(1)


def normalize(s: Tensor) -> Tensor:
    """Scale each sample's activations to mean square 1: the next block cannot use this one's goodness."""
    return s / (goodness(s) + EPS).sqrt().view(-1, *(1 for _ in s.shape[1:]))


class ForwardComponent(Component):
    """A block that learns by its own goodness; rows of right labels come first, then those of wrong ones."""

    def __init__(self, block: nn.Module, threshold: float) -> None:
        super().__init__()
        self.block = block
        self._threshold = threshold

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Normalised activations of both halves, and the loss."""
        s = self.block(signal.s)
        good, bad = goodness(s).chunk(2)
        loss = F.softplus(self._threshold - good).mean() + F.softplus(bad - self._threshold).mean()
        return Signal(normalize(s), signal.y), loss


class LabellingComponent(ForwardComponent):
    """The first block, which puts a right and a wrong label into each input.

    Args:
        block: the block.
        threshold: of goodness.
        put: puts labels into inputs.
        num_classes: number of classes.
    """

    def __init__(self, block: nn.Module, threshold: float, put: PutLabel, num_classes: int) -> None:
        super().__init__(block, threshold)
        self.put, self.classes = put, num_classes

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """As every block's, on the inputs with their labels and with others drawn at random."""
        x, y = signal.s, signal.y
        wrong = (y + torch.randint(1, self.classes, y.shape, device=y.device)) % self.classes
        both = torch.cat([self.label(x, y), self.label(x, wrong)])
        return super().forward(Signal(both, y))

    def label(self, x: Tensor, y: Tensor) -> Tensor:
        """Inputs with labels in them, at mean square 1."""
        return normalize(self.put(x, y, self.classes))


class ForwardForward(OneWayLearner):
    """The Forward-Forward algorithm, supervised.

    Idea: two forward passes in place of a forward and a backward one. The input carries a label; each block
        learns to have a large sum of squares where the label is right, and a small one where it is wrong.
    Equation: s_i = f_i(s_{i-1} / rms(s_{i-1})), s_{i-1} detached, s_0 the input with a label; g_i =
        mean(s_i²); f_i follows ∇ [log(1 + exp(θ - g_i⁺)) + log(1 + exp(g_i⁻ - θ))], + with the right label, -
        with another one. Prediction: the label with the largest Σ_i g_i, without the first block's where
        there are several.
    Use when: you need this well-known algorithm as a comparison, or study learning without a backward pass
        through layers.
    Do not use when: you want a trained network: `LocalLoss` and `MonoForward` learn from all classes at once.
        Prediction takes a forward for each class.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). In the paper a block is a layer and a ReLU. A block may
        contain any modules; a ``rule`` handles their calls of linear maps. Blocks end before the classifier.
    Cost: each block on twice the batch, and gradients of one block at a time. Prediction: C forwards.
    Status: variant: goodness is a mean, not a sum, so that θ does not depend on the width (1 is the paper's
        number of units); wrong labels are drawn evenly, not by how likely the network finds them. The
        recurrent and the unsupervised variants are not here.
    Source: Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", 2022, arXiv 2212.13345.
    Code: none of the author's that is public was found.
    Results: the paper: 1.36 % test errors on MNIST after 60 epochs, four layers of 2,000 units. Not
        reproduced here at that size. Ours: 86.4 % on 10,000 images of MNIST after five epochs (MLP;
        backpropagation 92.5), and 14.2 % on 10,000 of CIFAR-10 after three (eight convolutions, which see the
        label in a corner only; backpropagation 51.6; benchmarks/README.md); untuned, 73.0 % of the test
        digits after 150 steps, backpropagation 95.7 % (examples/plot_local_learners.py).
    Limits: classification by class index. Inputs are numbers, not tokens. The label replaces the first C
        numbers of an input (see ``put``), so that convolutions see it in a corner only. A block whose
        activations are all zero for a sample hands zeros on.

    Args:
        blocks: the layers f_i.
        num_classes: number of classes, C.
        threshold: θ, the goodness above which a label counts as right. Default 1. Range 0.3 to 10.
        skip: blocks, from the first on, whose goodness does not count at prediction; the last one's always
            does. Default 1, as in the paper. Range 0 to 1.
        put: puts labels into inputs, from inputs, classes and C. Default `write_label`: over the first C
            numbers, as in the paper.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``, which draws the wrong labels, too.

    Raises:
        PlywiseError: there are fewer than two classes.
        ValueError: ``threshold`` is not a positive number, or ``skip`` is not a whole number.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> x[torch.arange(32), 5 + y] += 4
        >>> layers = [nn.Sequential(nn.Linear(n, 64), nn.ReLU()) for n in (8, 64)]
        >>> adam = lambda groups: torch.optim.Adam(groups, lr=0.01)
        >>> learner = pw.ForwardForward(pw.Blocks(layers, x), num_classes=3, optimizer=adam)
        >>> losses = [learner.step(x, y) for _ in range(200)]
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
        threshold: float = 1.0,
        skip: int = 1,
        put: PutLabel = write_label,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_positive(self, threshold=threshold)
        if not isinstance(skip, int) or skip < 0:
            raise ValueError(f"ForwardForward: skip must be a whole number, 0 or more, not {skip!r}.")
        require_whole(self, num_classes=num_classes)
        if num_classes < 2:
            raise PlywiseError(f"ForwardForward needs 2 classes, to draw a wrong one: {num_classes} given.")
        why = "labels are written into the inputs, which are one tensor of numbers"
        blocks.refuse_carrying(type(self).__name__, why)
        self._classes, self._skip = num_classes, min(skip, len(blocks) - 1)
        first = LabellingComponent(blocks[0], threshold, put, num_classes)
        self._components = [first, *(ForwardComponent(block, threshold) for block in blocks[1:])]
        super().__init__(self._components, **training)

    def signal(self, x: Tensor, y: Tensor) -> Signal:
        """Return the batch as it is; the first component puts the labels in."""
        check_classes(y, self._classes)
        if not x.is_floating_point():
            raise DataError(
                f"ForwardForward puts labels into inputs, which must be numbers, and these are {x.dtype}. "
                "Give floats (for tokens, their embeddings), or take another learner, such as LocalLoss."
            )
        return Signal(x, y)

    def as_module(self) -> nn.Module:
        """Goodness of each label."""
        return GoodnessPath(self._components, self._skip)


class GoodnessPath(nn.Module):
    """Σ_i g_i for each label, over all blocks but the first ``skip``."""

    def __init__(self, components: list[ForwardComponent], skip: int) -> None:
        super().__init__()
        self.skip = skip
        self.components = nn.ModuleList(components)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, C)."""
        first: Any = self.components[0]
        y = torch.arange(first.classes, device=x.device).repeat(len(x))
        s = first.label(x.repeat_interleave(first.classes, 0), y)
        found = []
        for component in self.components:
            s = component.get_submodule("block")(s)
            found.append(goodness(s))
            s = normalize(s)
        return torch.stack(found[self.skip :]).sum(0).view(-1, first.classes)
