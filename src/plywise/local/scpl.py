"""SCPL: every block learns to bring samples of one class together and to separate the classes."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import require_positive
from plywise.local.blocks import Blocks, require_blocks
from plywise.local.heads import MakeHead, MeanLinear, make_pooling
from plywise.local.learner import OneWayLearner, PredictsByBlocks
from plywise.local.local_loss import LossComponent, make_headed_components, refuse_positions

WIDTH = 128


def mlp_projection(shape: torch.Size, num_classes: int) -> nn.Module:
    """Positions averaged into at most two along each axis, then two layers of 128 (the paper: 512, 1024)."""
    del num_classes  # a projection knows of no class
    layers, features = make_pooling(shape)
    return nn.Sequential(*layers, nn.Linear(features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class MeanProjection(MeanLinear):
    """The mean over positions, features last, then two layers of 128: for blocks of a transformer."""

    def __init__(self, shape: torch.Size, num_classes: int) -> None:
        super().__init__(shape[-1], WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, s: Tensor, mask: Tensor | None = None) -> Tensor:
        """Projections (N, 128) of activations (N, ..., d); of the positions in ``mask``, if it is given."""
        return self.last(super().forward(s, mask).relu())


def contrastive_loss(z: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the contrastive loss: low if samples are nearer to their own class than to others.

    ``-mean_i (1 / n_i) Σ_j log softmax_{j ≠ i}(ẑ_i · ẑ_j / temperature)``, j over the other samples of i's
    class, n_i the number of the class's samples with i itself, ẑ of norm 1. A sample alone in its
    class counts as 0.

    Args:
        z: projections, (N, d).
        y: classes, (N,).
        temperature: of the softmax.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> near, far = (contrastive_loss(z, torch.tensor(y)) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
        >>> bool(near < far)
        True
    """
    z = F.normalize(z.flatten(1), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    same = y[:, None] == y
    chances = logits.log_softmax(1).masked_fill(~same | itself, 0.0)
    return -(chances.sum(1) / same.sum(1)).mean()


class SCPL(PredictsByBlocks, OneWayLearner):
    """Supervised contrastive parallel learning, the successor of Associated Learning.

    Idea: a block needs no code of the target to learn by itself. It learns to bring the samples of a class
        together and to push other classes away. Only the last block learns to predict the class.
    Equation: z = p_i(s_i) of norm 1, s_i = f_i(s_{i-1}) with s_{i-1} detached; block i and its projection p_i
        follow the gradient of `contrastive_loss`(z, y); the last block follows cross-entropy. Prediction:
        f_K ∘ … ∘ f_1.
    Use when: you train blocks in a pipeline of processes, batches are large and classes few: each sample
        needs others of its class in the batch.
    Do not use when: batches are small compared with the number of classes: then most samples are the only
        ones of their class. See `LocalLoss`.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, those of projections too. The last block's output is one score for each class.
    Cost: a projection for each block, and N² products of projections. The activations of one block at a time.
    Status: variant: a reconstruction from descriptions: the default projection is small and pools positions;
        the loss divides by the samples of a class, the sample itself among them, as the authors' code is
        described.
    Source: SCPL, arXiv 2602.00062, 2026, whose text was not at hand; an earlier public text is "Cutting Long
        Gradient Flows: Decoupling End-to-End Backpropagation Based on Supervised Contrastive Learning",
        submitted to ICLR 2023. The loss is that of Khosla et al., "Supervised Contrastive Learning", NeurIPS
        2020, arXiv 2004.11362.
    Code: none that we could check.
    Results: third parties list for the paper: Tiny-ImageNet 48.95, AG News 92.12, IMDB 89.84 %. Not
        reproduced here at that size; ours, untuned: 97.3 % of the test digits after 150 steps,
        backpropagation 95.7 % (examples/plot_local_learners.py).
    Limits: classification by class index. In a pipeline with replicas, each process contrasts its own
        samples.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        projection: makes p_i from the shape of a sample's activations and C. Default `mlp_projection`, for
            transformers that were cut by `split` `MeanProjection`.
        temperature: of the softmax over samples. Default 0.1. Range 0.03 to 1.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the last block does not hand on a score for each class.
        ValueError: ``temperature`` is not a positive number.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> body, top = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)
        >>> learner = pw.SCPL(pw.Blocks([body, top], x), num_classes=3, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> (losses[-1] < losses[0] / 1.2).tolist()  # the first has a lower bound above 0
        [True, True]
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        projection: MakeHead = mlp_projection,
        temperature: float = 0.1,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_positive(self, temperature=temperature)
        refuse_positions(self, F.cross_entropy, blocks.shapes[-1], num_classes)
        self._blocks, self._classes, self._loss = blocks, num_classes, F.cross_entropy
        loss = partial(contrastive_loss, temperature=temperature)
        if projection is mlp_projection and blocks.carries:
            projection = MeanProjection
        hidden = make_headed_components(blocks, num_classes, projection, loss)[:-1]
        super().__init__([*hidden, LossComponent(blocks[-1], F.cross_entropy)], **training)
