"""Direct feedback alignment: the error at the output reaches every block through a fixed random matrix."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise.local.block_backward import BlockBackward
from plywise.local.blocks import Blocks, hide_padding, require_blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import Learner, PredictsByBlocks
from plywise.local.local_loss import Loss, compute_loss, require_loss, require_scores


class FeedbackComponent(Component):
    """A block, and the fixed matrix that brings it the error at the network's output; none for the last.

    Args:
        block: the block.
        errors: numbers in the error of one sample.
        shape: of what the block hands on for one sample; None for the last block.
    """

    feedback: Tensor | None

    def __init__(self, block: nn.Module, errors: int, shape: torch.Size | None) -> None:
        super().__init__()
        self.block = block
        matrix = None
        if shape is not None:
            bound = 1 / math.sqrt(shape.numel())
            matrix = torch.empty(errors, shape.numel()).uniform_(-bound, bound)
            like = next((p for p in block.parameters() if p.is_floating_point()), None)
            matrix = matrix if like is None else matrix.to(like)
        self.register_buffer("feedback", matrix)

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the block's output; its loss comes from the last block alone, and is 0 here."""
        s = self.block(signal.s)
        return Signal(s, signal.y), s.new_zeros(())

    def send_error(self, error: Tensor, s: Tensor) -> Tensor:
        """Return what stands for the gradient at the block's output ``s``: the error through the matrix."""
        if self.feedback is None:
            return error
        return (error.reshape(len(error), -1).to(self.feedback) @ self.feedback).view_as(s).to(s)


class DirectFeedback(PredictsByBlocks, Learner):
    """Direct feedback alignment (DFA).

    Idea: backpropagation sends the error back through the transposed weights of all layers above. Send it
        instead to each block directly, through a fixed random matrix: during training the weights align with
        this matrix.
    Equation: e = ∂ℓ/∂s_K at the output; block i gets e B_i in place of ∂ℓ/∂s_i, B_i fixed and uniform in
        ±1/√|s_i|. Within a block gradients are exact: for a block φ(W s), ∇W = ((e B_i) ⊙ φ'(W s)) sᵀ. The
        last block follows its own gradient. One block is backpropagation.
    Use when: you study learning without the transport of weights; as the baseline of local methods whose
        blocks all receive the same error.
    Do not use when: you train a convolutional network, where DFA is far worse; or memory is short, for all
        blocks' activations are kept until the error is known.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps. In the paper a block is one layer and its activation.
    Cost: that of backpropagation, less the gradients between blocks: one product of the error and B_i each.
        The activations of all blocks at a time, as in backpropagation.
    Status: faithful for blocks of one layer and its activation. Different: blocks of more layers follow exact
        gradients inside. The paper does not fix the scale of the matrices; this one is common.
    Source: Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016,
        arXiv 1609.01596.
    Code: anokland/dfa-torch (Lua).
    Results: not reproduced here at the paper's size. Ours: 91.5 against backpropagation's 92.5 % on 10,000
        images of MNIST (MLP), 34.5 against 51.6 % on 10,000 of CIFAR-10 (eight convolutions, three epochs;
        benchmarks/README.md); untuned, 93.3 % of the test digits after 150 steps, backpropagation 95.7 %
        (examples/plot_local_learners.py).
    Limits: blocks run in one process. A matrix has as many rows as the output has numbers for one sample:
        outputs of many numbers (sequences) make large matrices.

    Args:
        blocks: the network. The last block's output is the prediction.
        loss: of the prediction and targets, a scalar. Default cross-entropy.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: with the default loss, the last block does not hand on a score for each class.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> body, top = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.DirectFeedback(pw.Blocks([body, top], x), optimizer=sgd)
        >>> losses = [learner.step(x, y)[-1] for _ in range(100)]
        >>> bool(losses[-1] < losses[0] / 2)
        True
    """

    def __init__(self, blocks: Blocks, *, loss: Loss = F.cross_entropy, **training: Any) -> None:
        require_blocks(self, blocks)
        require_loss(self, loss)
        require_scores(blocks, loss)
        shape = blocks.shapes[-1]
        self._blocks, self._classes, self._loss = blocks, shape[-1] if shape else 1, loss
        errors = shape.numel()
        shapes: list[torch.Size | None] = [*blocks.shapes[1:-1], None]
        self._components = [
            FeedbackComponent(block, errors, shape) for block, shape in zip(blocks, shapes, strict=True)
        ]
        super().__init__(self._components, **training)

    def _sweep(self, signal: Signal) -> list[Tensor]:
        s, passages = signal.s, []
        for trainer, component in zip(self.trainers, self._components, strict=True):
            with trainer.randomness(self.steps), trainer.naming_failures(s):
                passages.append(BlockBackward(component.block, replace(signal, s=s), open_below=False))
            s = passages[-1].output.detach()
        with self.trainers[-1].randomness(self.steps):  # the backward's, should it draw any
            output = s.requires_grad_()
            with self.trainers[-1].naming_failures(output):
                loss = compute_loss(self._loss, output, signal.y)
            loss.backward()
            assert output.grad is not None
            parts = zip(self.trainers, self._components, passages, strict=True)
            for trainer, component, passage in parts:
                with trainer.naming_failures(passage.output):
                    sent = component.send_error(output.grad, passage.output)
                passage.learn(sent if component.feedback is None else hide_padding(sent, signal.carried))
                trainer.apply()
        return [loss.detach()] * len(self.trainers)
