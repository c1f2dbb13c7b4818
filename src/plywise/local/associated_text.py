"""Blocks and bridges of Associated Learning for text, as the authors' later code has them.

An embedding and then LSTMs or layers of a transformer; all maps of the targets end in tanh
(`plywise.local.associated_maps`), codes learn from the bridges (``detach_target=False``), and the first
decoder follows cross-entropy. Each LSTM starts with the final state of the one before. Blocks pass on one
tensor, so the state is appended to the sequence as two more places.

Source: the authors' PyTorch code, Hibb-bb/AL, folder associated_learning; see `plywise.AssociatedLearning`.
Another model of theirs there (model.py) detaches codes, adds dropout and sums an LSTM's final states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plywise.local.associated_maps import MakeBridge

STATE = 2
"""Places behind the sequence: the hidden and the cell state."""


class StatefulLSTM(nn.Module):
    """A bidirectional LSTM of one layer, which begins with the state that the block before hands on.

    Args:
        width: of a token's features.
        hidden: units in each direction; features that it hands on are twice as wide.
        first: whether the block before hands on no state; the LSTM then begins with zeros.
    """

    def __init__(self, width: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width), or with the state (B, T + 2, 2 hidden), to (B, T + 2, 2 hidden)."""
        begun = None
        if not self.first:
            x, state = x[:, :-STATE], x[:, -STATE:]
            # (B, 2, 2 hidden) to two of (directions, B, hidden)
            hidden, cell = state.unflatten(2, (2, -1)).permute(1, 2, 0, 3).contiguous()
            begun = hidden, cell
        output, ended = self.lstm(x, begun)
        places = [state.transpose(0, 1).flatten(1).unsqueeze(1) for state in ended]
        return torch.cat([output, *places], 1)


class MeanOverTokens(nn.Module):
    """The mean over places, of what is not 0, number by number: padding is 0."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to (B, width)."""
        return x.sum(1) / (x != 0).sum(1).clamp(min=1)


class LastToken(nn.Module):
    """The last output of a `StatefulLSTM`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T + 2, width) to (B, width)."""
        return x[:, -1 - STATE]


def mean_bridge(shape: torch.Size, code: int) -> nn.Module:
    """Return the mean of all tokens, a linear layer without bias, tanh: behind an embedding."""
    return nn.Sequential(MeanOverTokens(), nn.Linear(shape[-1], code, bias=False), nn.Tanh())


def last_bridge(shape: torch.Size, code: int) -> nn.Module:
    """Return the last output, a linear layer without bias, tanh: behind an LSTM."""
    return nn.Sequential(LastToken(), nn.Linear(shape[-1], code, bias=False), nn.Tanh())


def token_bridge(shape: torch.Size, code: int) -> nn.Module:
    """A linear layer without bias and tanh for each token, and their mean: behind a transformer's layer."""
    return nn.Sequential(nn.Linear(shape[-1], code, bias=False), nn.Tanh(), MeanOverTokens())


def lstm_text(
    vocabulary: int, width: int = 300, hidden: int = 128, layers: int = 2
) -> tuple[list[nn.Module], Sequence[MakeBridge]]:
    """Return an embedding and LSTMs, and the bridges behind them. Token 0 is padding.

    Example:
        >>> blocks, bridges = lstm_text(50, width=8, hidden=4)
        >>> nn.Sequential(*blocks)(torch.ones(3, 7, dtype=torch.long)).shape, len(bridges)
        (torch.Size([3, 9, 8]), 3)
    """
    widths = [width] + [2 * hidden] * layers
    lstms = [StatefulLSTM(widths[number], hidden, first=number == 0) for number in range(layers)]
    return [nn.Embedding(vocabulary, width, padding_idx=0), *lstms], [mean_bridge] + [last_bridge] * layers


def transformer_text(
    vocabulary: int, width: int = 300, heads: int = 6, layers: int = 2, **settings: Any
) -> tuple[list[nn.Module], Sequence[MakeBridge]]:
    """An embedding and layers of a transformer's encoder, and the bridges behind them. Token 0 is padding.

    As in the authors' code there is no code of places and padding is not masked.

    Args:
        vocabulary: number of tokens.
        width: of a token's features.
        heads: of the attention.
        layers: number of encoder layers.
        **settings: of `torch.nn.TransformerEncoderLayer`.
    """
    encoders = [nn.TransformerEncoderLayer(width, heads, batch_first=True, **settings) for _ in range(layers)]
    return [nn.Embedding(vocabulary, width, padding_idx=0), *encoders], [mean_bridge] + [
        token_bridge
    ] * layers
