"""Momentum auxiliary networks: a block's head holds a slow copy of the beginning of the next block."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import is_number, make_part
from plywise._util.modes import evaluating
from plywise.engine.health import SKIPPED
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.component import Signal
from plywise.local.heads import MakeHead, pooled_linear
from plywise.local.learner import Learner, PredictsByBlocks, learn_in_turn
from plywise.local.local_loss import Loss, make_headed_components, refuse_positions, require_loss


class MomentumHead(nn.Module):
    """A head behind a slow copy of what comes next, and beside that a copy that learns.

    Args:
        ahead: the beginning of the next block.
        shape: of what a sample's activations are before it.
        num_classes: number of classes.
        make_head: makes the head behind.
    """

    def __init__(self, ahead: nn.Module, shape: torch.Size, num_classes: int, make_head: MakeHead) -> None:
        super().__init__()
        self.slow = copy.deepcopy(ahead).requires_grad_(False)
        self.learned = copy.deepcopy(ahead).requires_grad_(True)
        like = next((p for p in ahead.parameters() if p.is_floating_point()), torch.zeros(()))
        with torch.no_grad(), evaluating(self.learned):
            found = self.learned(like.new_zeros(2, *shape))
        self.head = make_part(
            "MomentumAuxiliary: head", make_head, found.shape[1:], num_classes, kind=nn.Module
        )

    def forward(self, s: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.learned(s) + self.slow(s))

    @torch.no_grad()
    def follow(self, ahead: nn.Module, momentum: float) -> None:
        """Move the slow copy's parameters towards those that the next block has now."""
        for slow, now in zip(self.slow.parameters(), ahead.parameters(), strict=True):
            if now.is_floating_point():
                slow.lerp_(now, 1 - momentum)


def beginning(block: nn.Module) -> nn.Module:
    """Return a Sequential's first layer with parameters and those without beside it; any other block whole.

    Example:
        >>> beginning(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    if type(block) is not nn.Sequential:
        return block
    parts: list[nn.Module] = []
    for child in block:
        if any(True for _ in child.parameters()):
            if any(True for part in parts for _ in part.parameters()):
                break
            first = beginning(child)
            parts.append(first)
            if first is not child:
                break
        else:
            parts.append(child)
    return nn.Sequential(*parts)


class MomentumAuxiliary(PredictsByBlocks, Learner):
    """Supervised local learning with momentum auxiliary networks (MAN).

    Idea: a block that follows only its own head ignores what later blocks need. Put a copy of the beginning
        of the next block, averaged over the last steps, into its head. Then the head's loss depends on what
        the next block needs, and no gradient crosses blocks.
    Equation: s_i = f_i(s_{i-1}) with s_{i-1} detached; block i and its auxiliary network follow
        ∇ ℓ(h_i(c_i(s_i) + m_i(s_i)), y), where m_i and c_i begin as copies of the beginning of block i + 1,
        c_i learns, and m_i ← μ m_i + (1 - μ) f_{i+1} after each step, in the parameters of that beginning.
        Last block: ∇ ℓ(s_K, y). Prediction: f_K ∘ … ∘ f_1; heads are for training only.
    Use when: `LocalLoss` loses too much accuracy, and there is memory for a few more layers in each head.
    Do not use when: backpropagation fits; or blocks are one layer each of very different cost. The blocks run
        in one process: parameters flow from each block to the one before.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, those of auxiliary networks too. Of a Sequential block, the first layer with
        parameters is copied, of any other the whole block. The last block's output is one score for each
        class.
    Cost: for each block but the last, a forward of two copies of the beginning of the next, a backward of
        one, and a head. The activations of one block and its auxiliary network at a time.
    Status: faithful to the authors' code on the auxiliary network (the sum of a copy that learns, in the
        paper a "learnable bias", and a slow copy). Variant: the loss is cross-entropy, as in their comparison
        with decoupled greedy learning, not InfoPro's; the head is one linear layer behind pooling.
    Source: Su, Cai, Zhu, He, Xu, Guan, Si, "Momentum Auxiliary Network for Supervised Local Learning", ECCV
        2024, arXiv 2407.05623.
    Code: JunhaoSu0/MAN.
    Results: third parties list for the paper: test errors on CIFAR-10, ResNet-32 in 16 blocks, 14.08 %
        (decoupled greedy learning), 9.11 % with MAN, 6.37 % end to end. Not reproduced here at that size.
        Ours: 43.6 % on 10,000 images of CIFAR-10 after three epochs (eight blocks of one convolution each),
        where `LocalLoss` has 38.8 and backpropagation 51.6 %, at 0.46 of its memory and 0.42 of its speed
        (benchmarks/README.md); untuned, 95.7 % of the test digits after 150 steps, `LocalLoss` 94.5 %,
        backpropagation 95.7 % (examples/plot_local_learners.py).
    Limits: batch norm's running statistics in the copies are their own. A beginning that changes its input in
        place is refused.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        momentum: μ. The paper's is 0.995, for long trainings. Default 0.99. Range 0.9 to 0.999.
        head: makes a head from the shape of a sample's activations and C. Default `pooled_linear`.
        loss: of scores and targets, a scalar. With the default, cross-entropy, targets are class indices
            and are checked; another loss gets them as they are.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the last block does not hand on a score for each class, or the beginning of a block
            changes activations in place.
        ValueError: ``momentum`` is not in 0 to 1.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> body, top = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.MomentumAuxiliary(pw.Blocks([body, top], x), num_classes=3, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> (losses[-1] < losses[0] / 2).tolist()
        [True, True]
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        momentum: float = 0.99,
        head: MakeHead = pooled_linear,
        loss: Loss = F.cross_entropy,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        if not (is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(f"MomentumAuxiliary: momentum must lie in 0 to 1, not {momentum!r}.")
        require_loss(self, loss)
        refuse_positions(self, loss, blocks.shapes[-1], num_classes)
        why = "a head runs the beginning of the next block, which is not made of them"
        blocks.refuse_carrying(type(self).__name__, why)
        self._blocks, self._classes, self._loss, self._momentum = blocks, num_classes, loss, momentum
        ahead = [beginning(block) for block in blocks[1:]]
        units = iter(ahead)
        components = make_headed_components(
            blocks, num_classes, lambda shape, count: MomentumHead(next(units), shape, count, head), loss
        )
        self._followers: list[tuple[Any, nn.Module]] = [
            (component.head, unit) for component, unit in zip(components[:-1], ahead, strict=True)
        ]
        super().__init__(components, **training)

    def _sweep(self, signal: Signal) -> list[Tensor]:
        skipped = [trainer.health.total(SKIPPED) for trainer in self.trainers]
        losses = learn_in_turn(self.trainers, signal, self.steps)
        after = [trainer.health.total(SKIPPED) for trainer in self.trainers]
        for number, (head, unit) in enumerate(self._followers, start=1):
            if after[number] == skipped[number]:  # a step that did not happen leaves no trace
                head.follow(unit, self._momentum)
        return losses
