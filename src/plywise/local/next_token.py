"""Local next-token learning: every block of a language model predicts the next token by itself."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import make_part, require_kind, require_whole
from plywise.data.batches import Batch, take_samples
from plywise.data.reading import IGNORED
from plywise.engine.capture.masked_rows import use_found_mask
from plywise.errors import BlockError, DataError
from plywise.local.blocks import Blocks, chain_blocks, require_blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner, check_classes

MakeTokenHead = Callable[[int, int], nn.Module]
"""Makes a head from the width of a token and the number of scores."""


def linear_head(width: int, scores: int) -> nn.Module:
    """Return a layer norm and one linear map of each token, which begins small.

    Example:
        >>> linear_head(8, 65)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 65])
    """
    layer = nn.Linear(width, scores, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(nn.LayerNorm(width), layer)


def mlp_head(width: int, scores: int) -> nn.Module:
    """Return a layer norm and a network of one hidden layer, twice as wide, of each token."""
    hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
    return nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(2 * width, scores))


class Readout(nn.Module):
    """Scores of each token, by a head, or by the head's products with a table of the vocabulary.

    Args:
        head: from a token's features to scores, or with a table, to features.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, s: Tensor, table: Tensor | None) -> Tensor:
        """Features (..., width) to scores (..., vocabulary)."""
        found: Tensor = self.head(s)
        return found if table is None else found @ table.T


class TokenComponent(Component):
    """A block, and the mean cross-entropy of its readout's scores for each token.

    Args:
        block: the block.
        readout: its readout; None where the block's output is the scores.
        pieces: in how many parts a batch runs, backward included.
        table: the vocabulary's embedding, in the first component of a model with tied heads. The following
            components get its weight, detached, as the signal's codes.
    """

    def __init__(
        self, block: nn.Module, readout: Readout | None, pieces: int, table: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.readout = readout
        self._pieces = pieces
        self.table = [] if table is None else [table]  # in a list: it is a part of the block already

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the block's output, and the mean over all tokens that count of the cross-entropy.

        Raises:
            PlywiseError: there is not one target for each place of the output.
        """
        s, y = signal.through(self.block), signal.y
        if s.shape[:-1] != y.shape:
            raise DataError(
                f"Targets of shape {tuple(y.shape)} are not a token for each place of the features "
                f"{tuple(s.shape)}."
            )
        codes = self.table[0].weight if self.table else signal.codes
        return replace(signal, s=s, codes=codes), self._loss(s, y, codes)

    def _loss(self, s: Tensor, y: Tensor, table: Tensor | None) -> Tensor:
        counts = y != IGNORED
        with nullcontext() if y.dim() != 2 or bool(counts.all()) else use_found_mask(counts):
            scores = s if self.readout is None else self.readout(s, table)
        total = F.cross_entropy(scores.flatten(0, -2), y.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / counts.sum().clamp_min(1)

    def split(self, signal: Signal) -> list[tuple[Signal, float]]:
        """Parts of the batch; the share of each is that of the tokens that count."""
        numbers = (signal.y != IGNORED).reshape(len(signal.y), -1).sum(1).tolist()  # tokens of each sample
        samples, total = len(numbers), max(sum(numbers), 1)
        pieces = min(self._pieces, samples, signal.y.numel() // 2) or 1  # batch norm fails on a single token
        edges = [samples * number // pieces for number in range(pieces + 1)]
        parts = []
        for first, stop in itertools.pairwise(edges):
            s, y, carried = take_samples((signal.s, signal.y, signal.carried), slice(first, stop))
            part = replace(signal, s=s, y=y, carried=carried)
            parts.append((part, sum(numbers[first:stop]) / total))
        return parts

    def join(self, signal: Signal, parts: Sequence[Signal]) -> Signal:
        """Return the parts in a row, and the vocabulary's table as it is before this component's step."""
        whole = super().join(signal, parts)
        return whole if whole.codes is None else replace(whole, codes=whole.codes.clone())


class LocalNextToken(OneWayLearner):
    """Block-local learning of sequences: each block predicts the next token by a private head.

    Idea: every block of a language model has a small head of its own and learns to predict the next token
        from its features. No gradient crosses blocks, so that only one block's graph exists at a time, and
        that of one part of the batch: a part runs forward and backward before the next one does.
    Equation: s_i = f_i(s_{i-1}) with s_{i-1} detached; block i and its head h_i follow the gradient of
        mean_t -log softmax(h_i(s_i[t]))[y_t]. With tied heads, h_i(s) = E norm_i(s), E the embedding of the
        first block, which learns there and is detached in all other blocks. Prediction: h_K ∘ f_K ∘ … ∘ f_1.
        One block is backpropagation.
    Use when: a language model's activations do not fit into memory, or its blocks train in a pipeline of
        processes or on several machines.
    Do not use when: backpropagation fits and the last percent of the loss matters.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model, also from one that makes masks and positions of its
        inputs). Features come last: tokens (B, T) or features (B, ..., width) in, (B, ..., width) out. A
        block may contain any modules. If the last block hands on as many features as there are scores, they
        are the scores; otherwise it has a head, too.
    Cost: a head for each block. The activations and the scores of one block and one part of the batch at a
        time, beside the block's input and output for the whole batch.
    Status: after descriptions of the idea: the head, the pieces and the tied variant are ours. The source's
        private heads are whole decoder layers: give one as ``head``.
    Source: block-wise next-token losses with private heads are described in Green, 2026 (a web article; its
        text was not at hand); local losses are those of Belilovsky, Eickenberg, Oyallon, ICML 2019,
        arXiv 1812.11446.
    Code: none that is public.
    Results: four blocks of a transformer on tiny Shakespeare, 400 steps, three seeds, rates tuned: 2.34 nats
        a character, backpropagation 2.38, at 0.20 of its memory (benchmarks/README.md). Three blocks, 300
        steps, one seed, neither rate tuned: 2.06 with tied heads, backpropagation 2.23
        (examples/plot_local_next_token.py). Of backpropagation's memory in a step, all tensors counted, four
        blocks take less than a quarter and eight less than an eighth (tests).
    Limits: with tied heads the vocabulary's embedding learns from the first block alone. Targets of -100
        are ignored by losses and heads; blocks run on their positions all the same. What looks at the
        samples of a batch together sees those of a part: batch norm, and rules of one batch (`ProxProp`);
        ``pieces=1`` gives them all.

    Args:
        blocks: the network.
        num_classes: number of tokens, V.
        head: makes a head from the width of a token and V, or with ``tied``, from the width and the
            embedding's width. Default `linear_head`; `mlp_head` is larger. With ``tied``, the default is a
            layer norm.
        tied: the embedding of the first block whose weight (V, width) all heads read with. Default none.
        pieces: parts of the batch that run one after another, backward included. The gradients add up to
            those of the whole. More parts save memory and take time. Default 2. Range 1 to 16.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: ``tied`` is not an embedding of the first block, or its width is not that of the features.
        PlywiseError: at a step, targets are not one token for each place.
        ValueError: ``pieces`` is not a whole number above 0.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x = torch.arange(7).repeat(8, 1) + torch.arange(8)[:, None]
        >>> x, y = x[:, :-1] % 5, x[:, 1:] % 5  # the next token is one more
        >>> layers = [nn.Embedding(5, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())]
        >>> adam = lambda groups: torch.optim.Adam(groups, lr=0.02)
        >>> learner = pw.LocalNextToken(pw.Blocks(layers, x), num_classes=5, optimizer=adam)
        >>> losses = [learner.step(x, y) for _ in range(100)]
        >>> bool((losses[-1] < 0.1).all())
        True
        >>> learner.predict(x).shape
        torch.Size([8, 6, 5])
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        head: MakeTokenHead = linear_head,
        tied: nn.Embedding | None = None,
        pieces: int = 2,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_whole(self, num_classes=num_classes, pieces=pieces)
        self._blocks, self._classes, self._dimensions = blocks, num_classes, len(blocks.shapes[-1])
        if tied is not None:
            _check_tied(blocks, tied, num_classes)
        components, like = [], None
        for number, (block, shape) in enumerate(zip(blocks, blocks.shapes[1:], strict=True)):
            like = next((p for p in block.parameters() if p.is_floating_point()), like)
            readout = None
            if tied is not None or number < len(blocks) - 1 or shape[-1:] != (num_classes,):
                readout = _make_readout(head, shape, num_classes, tied)
                readout = readout if like is None else readout.to(like)
            table = tied if number == 0 else None
            components.append(TokenComponent(block, readout, pieces, table))
        self._components = components
        super().__init__(components, **training)

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return the batch as it is, if there is a token for each place."""
        if y.dim() != self._dimensions:
            raise DataError(
                f"Targets must be class indices, one torch.long for each token, of {self._dimensions} "
                f"dimensions, not {y.dtype} of shape {tuple(y.shape)}."
            )
        known = y[y != IGNORED]
        if known.numel() or y.dtype != torch.long:
            check_classes(known, self._classes)
        return self._blocks.begin(x, y)

    def as_module(self, depth: int | None = None) -> nn.Module:
        """The network that predicts; with ``depth``, from the first ``depth`` blocks and the head behind."""
        return TokenPath(self._components[:depth])


class TokenPath(nn.Module):
    """The blocks, one after another, and the last one's readout."""

    def __init__(self, components: list[TokenComponent]) -> None:
        super().__init__()
        self.blocks = chain_blocks(component.block for component in components)
        self.readout = components[-1].readout
        self.table = next(iter(components[0].table), None)

    def forward(self, x: Batch) -> Tensor:
        """Tokens (B, T) to scores (B, T, V)."""
        s: Tensor = self.blocks(x)
        if self.readout is None:
            return s
        return self.readout(s, None if self.table is None else self.table.weight)


def _make_readout(head: MakeTokenHead, shape: torch.Size, scores: int, tied: nn.Embedding | None) -> Readout:
    if not shape:
        raise BlockError("A block hands on one number a sample; a head needs features, which come last.")
    if tied is None:
        return Readout(make_part("LocalNextToken: head", head, shape[-1], scores, kind=nn.Module))
    if head is linear_head:
        return Readout(nn.LayerNorm(shape[-1]))
    width = tied.embedding_dim
    return Readout(make_part("LocalNextToken: head", head, shape[-1], width, kind=nn.Module))


def _check_tied(blocks: Blocks, tied: nn.Embedding, num_classes: int) -> None:
    require_kind("LocalNextToken", "tied", tied, nn.Embedding, "an nn.Embedding of the first block")
    if all(parameter is not tied.weight for parameter in blocks[0].parameters()):
        raise BlockError(
            "The embedding that heads are tied to is not part of the first block: it would not be trained."
        )
    if tied.num_embeddings < num_classes:
        raise BlockError(f"The tied embedding has {tied.num_embeddings} rows for {num_classes} tokens.")
