"""Interlocking backpropagation: every block follows the loss of the head a few blocks above."""

from collections import deque
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from plywise._util.checks import require_whole
from plywise.local.block_backward import BlockBackward
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.component import Signal
from plywise.local.heads import MakeHead, pooled_linear
from plywise.local.learner import Neighbours, PredictsByBlocks, StagedLearner
from plywise.local.local_loss import Loss, choose_loss, make_headed_components
from plywise.local.trainer import LocalTrainer


class Interlocking(PredictsByBlocks, StagedLearner):
    """n-wise interlocking backpropagation.

    Idea: a block that only follows its own head discards what later blocks need. Let it follow the head n - 1
        blocks above, so that neighbouring blocks learn together. No gradient crosses more than n blocks.
    Equation: ℓ_i = ℓ(h_i(s_i), y), and ℓ_K = ℓ(s_K, y) for the last of K blocks. Block i follows
        ∇ ℓ_min(i+n-1, K) alone, through the blocks in between; head h_i follows ∇ ℓ_i with s_i detached.
        1-wise is `LocalLoss`, K-wise backpropagation of ℓ_K.
    Use when: blocks with losses of their own lose too much accuracy, and backpropagation through the whole
        network is too deep for the memory.
    Do not use when: backpropagation fits in one process: it follows the true loss everywhere, for no more
        work.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, those of heads too. The last block's output is one score for each class.
    Cost: a head for each block; one backward through all blocks, and for each loss but the last ones
        n - 1 blocks backward to their inputs only: (K - n)(n - 1) in all, half a block's backward each. The
        activations of n blocks at a time.
    Status: faithful in what every block and head follows, in one process and in a pipeline of several, which
        ends in the same weights. Different: the default head is one linear layer behind pooling, theirs a
        small ConvNet.
    Source: Gomez, Key, Perlin, Gou, Frosst, Dean, Gal, "Interlocking Backpropagation: Improving depthwise
        model-parallelism", JMLR 23, 2022, arXiv 2010.04116.
    Code: oscarkey/interlocking-backprop (its ResNets; the Transformers' code is not public).
    Results: the paper's abstract: more accurate than local learning, more efficient than global; its tables
        were not at hand. Ours, with horizon 2: 94.1 % on 10,000 images of MNIST (MLP; local 93.3,
        backpropagation 94.1), 50.9 % on 3,000 of CIFAR-10 (48.5, 50.0). With eight blocks of one convolution
        each, three epochs on 10,000 images of CIFAR-10, it gains nothing: 37.5 % (38.8, 51.6). On a
        transformer of four blocks the paper's order, the longer the better, is not seen: after 400 steps on
        tiny Shakespeare horizons 1, 2 and 3 have 2.34, 2.42 and 2.39 nats a character, backpropagation 2.38;
        after 1,000, in the same order, 2.10, 2.22, 2.12 and 2.08 (three seeds; benchmarks/README.md).
    Limits: in a pipeline (`plywise.pipeline`) gradients of the n - 1 blocks below a cut come from the stage
        after it, so that a stage waits with the next batch until its neighbour has run its first n - 1 blocks
        on this one; a stage has one replica. A rule's gradients cross blocks, but other values from the
        layers above (back-matching's energies) start again in every block. Torch refuses reentrant
        checkpoints inside a block.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        horizon: n, blocks that a gradient travels through; K or more is backpropagation. Default 2. Range 1
            to 8.
        head: makes a head from the shape of a sample's activations and C. Default `pooled_linear`.
        loss: of scores and targets, a scalar. With the default, cross-entropy, targets are class indices
            and are checked; another loss gets them as they are.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the last block does not hand on a score for each class.
        ValueError: the horizon is not a whole number above 0.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)] + [nn.Linear(8, 3)]
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.Interlocking(pw.Blocks(layers, x), num_classes=3, horizon=2, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> bool(losses[-1][-1] < losses[0][-1] / 2)
        True
        >>> learner.predict(x).shape
        torch.Size([32, 3])
    """

    sends_back = True

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        horizon: int = 2,
        head: MakeHead = pooled_linear,
        loss: Loss = F.cross_entropy,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_whole(self, horizon=horizon)
        loss = choose_loss(self, loss, blocks.shapes[-1], num_classes)
        self._blocks, self._classes, self._loss = blocks, num_classes, loss
        self.horizon = horizon
        self._components = make_headed_components(blocks, num_classes, head, loss)
        super().__init__(self._components, **training)

    def learn_stage(self, first: int, stop: int, signal: Signal, neighbours: Neighbours) -> list[Tensor]:
        """Run the blocks; send each head's gradient to the block that follows it, in any stage."""
        last, losses, s = len(self.trainers) - 1, [], signal.s
        stage = _Stage(first, neighbours)
        with self.trainers[last].randomness(self.steps):  # the backward's, should it draw any
            for index in range(first, stop):
                trainer, component = self.trainers[index], self._components[index]
                with trainer.randomness(self.steps), trainer.naming_failures(s):
                    is_open = index > 0 and self.horizon > 1
                    passage = BlockBackward(component.block, replace(signal, s=s), open_below=is_open)
                    s = passage.output.detach().requires_grad_()
                    if index == stop - 1 < last:
                        neighbours.emit(replace(signal, s=s.detach()))
                    loss = component.judge(s, signal.y, signal.carried)
                    loss.backward()
                losses.append(loss.detach())
                stage.waiting.append((trainer, passage))
                assert s.grad is not None
                self._teach(stage, index, s.grad)
            for index in range(stop, last + 1):  # the heads of the stages after
                if self._reaches(index, stop - 1):
                    self._teach(stage, index, neighbours.receive_back())
        return losses

    def _reaches(self, head: int, block: int) -> bool:
        """Return whether a head's gradient travels down to a block's output."""
        lowest = head - self.horizon + 1
        return block >= max(lowest, 0) and (lowest >= 0 or head == len(self.trainers) - 1)

    def _teach(self, stage: "_Stage", head: int, gradient: Tensor) -> None:
        """Send a head's gradient down through the waiting blocks of a stage, to the block that follows it.

        The last head is followed by all that still wait, every other one by the block n - 1 before it.
        """
        is_last, target = head == len(self.trainers) - 1, head - self.horizon + 1
        if is_last:
            gradient = stage.teach_all(gradient, self._reaches(head, stage.first - 1))
        elif target >= stage.first:
            stage.teach_first(gradient)
        elif target >= 0:
            gradient = stage.send_through(gradient)
        if stage.first > 0 and self._reaches(head, stage.first - 1):
            stage.neighbours.send_back(gradient)


class _Stage:
    """Blocks of one process whose loss is still to come."""

    def __init__(self, first: int, neighbours: Neighbours) -> None:
        self.first = first
        self.neighbours = neighbours
        self.waiting: deque[tuple[LocalTrainer, BlockBackward]] = deque()

    def send_through(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the first block's input for a gradient at the last block's output."""
        for _, passage in reversed(self.waiting):
            gradient = passage.below(gradient)
        return gradient

    def teach_first(self, gradient: Tensor) -> None:
        """Send a gradient from the last block's output to the first block, which learns and is finished."""
        trainer, first = self.waiting.popleft()
        first.learn(self.send_through(gradient))
        trainer.apply()

    def teach_all(self, gradient: Tensor, goes_on: bool) -> Tensor:
        """Send a gradient down from the last block's output; every block learns from it and is done.

        Returns:
            The gradient at the first block's input, if it ``goes_on`` to the stage before.
        """
        while self.waiting:
            trainer, passage = self.waiting.pop()
            if self.waiting or goes_on:
                gradient = passage.learn_and_below(gradient)
            else:
                passage.learn(gradient)
            trainer.apply()
        return gradient
