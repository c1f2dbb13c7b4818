"""The networks of the workloads: small, and chains where they can be, so that local learners can cut them."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between.

    Example:
        >>> [type(layer).__name__ for layer in mlp(4, 8, 2)]
        ['Linear', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def autoencoder(*sizes: int) -> nn.Sequential:
    """Down through ``sizes`` and up again, ELU between, pixels in [0, 1] at the end.

    The code in the middle is linear.
    """
    down, up = mlp(*sizes, activation=nn.ELU), mlp(*reversed(sizes), activation=nn.ELU)
    return nn.Sequential(*down, *up, nn.Sigmoid())


def conv_net(
    shape: tuple[int, int, int], channels: Sequence[int], dense: Sequence[int], kernel: int = 3
) -> nn.Sequential:
    """Convolutions, each with ReLU and a halving of the image by pooling, then linear layers.

    Args:
        shape: of an image: channels, height, width.
        channels: outputs of the convolutions.
        dense: outputs of the linear layers, classes last.
        kernel: side of the convolutions' windows, odd.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((shape[0], *channels)):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)]
    height, width = (size >> len(channels) for size in shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), *mlp(channels[-1] * height * width, *dense))


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(*widths: int, classes: int = 10) -> nn.Sequential:
    """A stem, one residual block a width (each after the first halves the image), mean, linear layer."""
    stem = nn.Sequential(
        nn.Conv2d(3, widths[0], 3, 2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    )
    blocks = [Residual(widths[0], widths[0]), *(Residual(*pair, stride=2) for pair in pairwise(widths))]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class Attention(nn.Module):
    """Causal self-attention of several heads, its four maps in two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gather = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, width) to the same; each sees itself and those before."""
        parts = self.gather(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.mix(seen.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a small network for each token, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(nn.LayerNorm(width), *mlp(width, 4 * width, width, activation=nn.GELU))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, width) to the same."""
        x = x + self.attend(x)
        return x + self.think(x)


class TokenEmbedding(nn.Module):
    """What a transformer begins with: an embedding of each token, and one of its place.

    Args:
        tokens: the vocabulary's embedding.
        places: the embedding of places, (longest context, width).
    """

    def __init__(self, tokens: nn.Embedding, places: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.places = places

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), long, to features (B, T, width)."""
        embedded: Tensor = self.tokens(tokens)
        return embedded + self.places.weight[: tokens.shape[1]]


class CharTransformer(nn.Module):
    """Scores of the next character at each place; the embedding is the last layer's weight, too.

    Args:
        vocabulary: number of characters.
        context: most characters in a row.
        width: of a token.
        depth: number of blocks.
        heads: of the attention.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.characters, self.places):  # small, so that the first scores are near each other
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.characters.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Characters (B, T), long, to scores (B, T, vocabulary)."""
        x = self.characters(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    @property
    def table(self) -> nn.Embedding:
        """The embedding of the characters, whose weight is the head's, too."""
        return self.characters

    def trunk(self) -> nn.Sequential:
        """The layers before the norm and the head, as a chain that can be cut: it holds these very layers.

        The head cannot be in it, since it shares its weight with the first layer.
        """
        return nn.Sequential(TokenEmbedding(self.characters, self.places), *self.blocks)

    def untied(self) -> nn.Sequential:
        """The network as a chain that can be cut: its head has a weight of its own, which begins as it is."""
        head = nn.Linear(self.head.in_features, self.head.out_features, bias=False).to(self.head.weight)
        head.weight.data.copy_(self.head.weight)
        return nn.Sequential(*self.trunk(), self.norm, head)
