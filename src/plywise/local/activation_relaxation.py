"""Activation Relaxation: activations settle at backpropagation's gradients."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plywise._util.checks import require_positive, require_whole
from plywise.local.block_backward import BlockBackward
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.component import Signal
from plywise.local.learner import Learner, PredictsByBlocks
from plywise.local.local_loss import (
    Loss,
    LossComponent,
    choose_loss,
    compute_loss,
    require_loss,
    require_scores,
)


class ActivationRelaxation(PredictsByBlocks, Learner):
    """Activation Relaxation.

    Idea: after the forward pass the activations between blocks are changed step by step, each with the value
        of the block above, until they converge; what they converge to are backpropagation's gradients.
    Equation: x_K = ∂ℓ/∂s_K, fixed; x_i starts at the activation s_i. T times, from the top down:
        x_i ← x_i - η_x (x_i - J_{i+1}ᵀ x_{i+1}), J the blocks' Jacobians at the forward pass. Block i
        follows the vector-Jacobian product of x_i. The error shrinks as (1 - η_x)^T times a power of T;
        with η_x = 1 one sweep is backpropagation.
    Use when: you study how gradients could come about without a backward pass.
    Do not use when: you want a trained network: the same gradients cost T times as much.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps. The last block's output is the prediction.
    Cost: T backward passes to the inputs; the activations of the whole network.
    Status: faithful to the plain algorithm. Its variants (learned backward weights, no derivative of the
        nonlinearity) are not here. The default loss is a mean, the paper's a sum. All samples share a bias,
        as in torch; the authors' code has a bias for each sample.
    Source: Millidge, Tschantz, Seth, Buckley, "Activation Relaxation: A Local Dynamical Approximation to
        Backpropagation in the Brain", 2020, arXiv 2009.05359.
    Code: BerenMillidge/ActivationRelaxation.
    Results: not reproduced here. Once it has converged, its gradients are backpropagation's, and so is its
        accuracy; tests/local/test_activation_relaxation.py checks the gradients. The paper's figures were not
        at hand.
    Limits: x starts as large as activations and ends as small as gradients: with a loss averaged over N
        samples, as by default here, it takes about ln(N)/η_x sweeps more than with a summed one. Blocks run
        in one process.

    Args:
        blocks: the network. The last block's output is the prediction.
        loss: of predictions and targets, a scalar. With the default, cross-entropy, targets are class
            indices and are checked; another loss gets them as they are.
        rate: η_x, below 2, where the relaxation diverges. Default 0.1. Range 0.05 to 1.
        iterations: T. Default 100. Range 1 to 200.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the loss is cross-entropy, and the last block's output is not a row of scores.
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> blocks = pw.Blocks([nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 3)], x)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.ActivationRelaxation(blocks, rate=0.5, iterations=10, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> (losses[-1] < losses[0] / 2).tolist()  # there is one loss: every block's
        [True, True]
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        loss: Loss = F.cross_entropy,
        rate: float = 0.1,
        iterations: int = 100,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_positive(self, rate=rate)
        require_whole(self, iterations=iterations)
        if rate >= 2:
            raise ValueError(f"ActivationRelaxation: rate must be below 2, or x diverges; it is {rate!r}.")
        shape = blocks.shapes[-1]
        require_loss(self, loss)
        if blocks.carries and shape:
            loss = choose_loss(self, loss, shape, shape[-1])
        require_scores(blocks, loss)
        self._blocks, self._classes, self._loss = blocks, shape[-1] if shape else 1, loss
        self.rate, self.iterations = rate, iterations
        super().__init__((LossComponent(block, loss) for block in blocks), **training)

    def _sweep(self, signal: Signal) -> list[Tensor]:
        passages: list[BlockBackward] = []
        begun: list[Tensor] = []
        s = signal.s
        with self.trainers[-1].randomness(self.steps):  # the loss's and the backward's, should they draw any
            for trainer, block in zip(self.trainers, self._blocks, strict=True):
                if passages:
                    begun.append(s.clone())  # the block may change s in place
                with trainer.randomness(self.steps), trainer.naming_failures(s):
                    passages.append(BlockBackward(block, replace(signal, s=s), open_below=bool(passages)))
                s = passages[-1].output.detach()
            with self.trainers[-1].naming_failures(s):
                loss = compute_loss(self._loss, s.requires_grad_(), signal.y)
            (top,) = torch.autograd.grad(loss, s)
            backward_values = self._relax(passages, [*begun, top])
            for passage, gradient in zip(passages, backward_values, strict=True):
                passage.learn(gradient)
        for trainer in self.trainers:
            trainer.apply()
        return [loss.detach()] * len(passages)

    def _relax(self, passages: list[BlockBackward], x: list[Tensor]) -> list[Tensor]:
        """Return the x that each block follows, of those that the relaxation begins with."""
        for _ in range(self.iterations):
            for i in reversed(range(len(passages) - 1)):
                x[i] = torch.lerp(x[i], passages[i + 1].below(x[i + 1]), self.rate)
        return x
