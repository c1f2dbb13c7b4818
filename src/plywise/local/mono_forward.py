"""Mono-Forward: every block learns from the cross-entropy of its own projection; all projections vote."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import require_choice, require_whole
from plywise.data.batches import Batch
from plywise.local.blocks import Blocks, hide_padding, require_blocks, run_blocks
from plywise.local.component import Signal
from plywise.local.learner import OneWayLearner, check_classes
from plywise.local.local_loss import LossComponent


class ProjectedComponent(LossComponent):
    """A block, and the loss of what its projection makes of all its activations, padding hidden."""

    def judge(self, s: Tensor, y: Tensor, carried: Batch = None) -> Tensor:
        """Return the loss of the block's output ``s``."""
        assert self.head is not None
        return self._loss(self.head(hide_padding(s, carried)), y)


class MonoForward(OneWayLearner):
    """The Mono-Forward algorithm.

    Idea: each layer has a matrix that projects its activations to one "goodness" a class, and learns,
        together with the matrix, by the cross-entropy of these. At prediction the layers' goodness adds up.
    Equation: a_i = f_i(a_{i-1}) with a_{i-1} detached, G_i = a_i M_iᵀ; f_i and M_i follow
        ∇ CE(softmax(G_i), y). Prediction: argmax of Σ_i G_i, or of G_L alone (``votes="last"``).
    Use when: you want a simple baseline of local learning without negative data (`ForwardForward`) and
        without a choice of heads.
    Do not use when: blocks have large feature maps as outputs: M_i has a row of all features for each class.
        See `LocalLoss`, whose default head pools.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, and the projections. Blocks end before the classifier.
    Cost: a projection for each block, C times its features. The activations of one block at a time.
    Status: faithful in equations and in both ways to predict, as the paper's summary gives them;
        variant in that blocks may be larger than the paper's single layers.
    Source: Gong, Li, Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network
        Training Harnessing Local Errors", 2025, arXiv 2501.09238.
    Code: none that is public was found.
    Results: the paper's abstract: at least as accurate as backpropagation on image sets from MNIST to
        CIFAR-100. Not reproduced here at that size. Ours: 54.7 against backpropagation's 51.6 % on 10,000
        images of CIFAR-10 after three epochs (eight blocks of one convolution each) at 0.40 of its memory,
        93.0 against 92.5 % on MNIST (benchmarks/README.md); untuned, 96.0 % of the test digits after 150
        steps, backpropagation 95.7 % (examples/plot_local_learners.py).
    Limits: classification by class index. The sum of all votes need not be better than the best of them.

    Args:
        blocks: the layers f_i.
        num_classes: number of classes, C.
        votes: "all", the sum over blocks, or "last". Default "all".
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        ValueError: ``votes`` is neither "all" nor "last", or there is no class.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> layers = [nn.Sequential(nn.Linear(n, 16), nn.ReLU()) for n in (8, 16)]
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.MonoForward(pw.Blocks(layers, x), num_classes=3, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> (losses[-1] < losses[0] / 2).tolist()
        [True, True]
    """

    def __init__(self, blocks: Blocks, num_classes: int, *, votes: str = "all", **training: Any) -> None:
        require_blocks(self, blocks)
        require_whole(self, num_classes=num_classes)
        require_choice(self, "votes", votes, ("all", "last"))
        self._blocks, self._classes, self._votes = blocks, num_classes, votes
        self._components: list[LossComponent] = []
        like = None
        for block, shape in zip(blocks, blocks.shapes[1:], strict=True):
            like = next((p for p in block.parameters() if p.is_floating_point()), like)
            projection = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), num_classes, bias=False))
            projection = projection if like is None else projection.to(like)
            self._components.append(ProjectedComponent(block, F.cross_entropy, projection))
        super().__init__(self._components, **training)

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return the batch as it is."""
        check_classes(y, self._classes)
        return self._blocks.begin(x, y)

    def as_module(self, depth: int | None = None) -> nn.Module:
        """Return the network that predicts; with ``depth``, from the first ``depth`` blocks."""
        return VotingPath(self._components[:depth], self._votes == "all")


class VotingPath(nn.Module):
    """The sum of all projections' scores, or the scores of the last one."""

    def __init__(self, components: list[LossComponent], everyone: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(component.block for component in components)
        heads = [component.head for component in components if component.head is not None]
        self.heads = nn.ModuleList(heads if everyone else heads[-1:])

    def forward(self, x: Batch) -> Tensor:
        """Scores (N, C)."""
        silent = len(self.blocks) - len(self.heads)
        votes = []
        for number, s in enumerate(run_blocks(self.blocks, x)):
            if number >= silent:  # now: the next block may change s in place
                votes.append(self.heads[number - silent](hide_padding(s, x)))
        return torch.stack(votes).sum(0)
