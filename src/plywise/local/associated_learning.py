"""Associated Learning: inputs and targets are encoded towards each other, and meet in every component."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise.local.associated_networks import he_normal_
from plywise.local.blocks import Blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner, check_classes

MakeBridge = Callable[[torch.Size, int], nn.Module]
MakeEncoder = Callable[[Tensor, int], nn.Module]


def wide_bridge(shape: torch.Size, code: int) -> nn.Module:
    """The paper's bridge: two sigmoid layers, the first five times as wide as the code; `he_normal_`."""
    layers = (nn.Linear(shape.numel(), 5 * code), nn.Sigmoid(), nn.Linear(5 * code, code), nn.Sigmoid())
    return he_normal_(nn.Sequential(nn.Flatten(), *layers))


def pooled_bridge(shape: torch.Size, code: int) -> nn.Module:
    """`wide_bridge` behind pooling to at most 4×4 positions, for images: a fraction of its cost.

    The two layers stay, since one alone costs accuracy.
    """
    if len(shape) != 3:
        return wide_bridge(shape, code)
    size = (min(shape[1], 4), min(shape[2], 4))
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), wide_bridge(torch.Size((shape[0], *size)), code))


def paper_encoder(codes: Tensor, width: int) -> nn.Module:
    """The paper's target encoder: a sigmoid layer, `he_normal_`.

    Args:
        codes: what it gets to begin with, a row for each class, (C, below).
        width: of its own codes.
    """
    return he_normal_(nn.Sequential(nn.Linear(codes.shape[1], width), nn.Sigmoid()))


def apart_encoder(codes: Tensor, width: int) -> nn.Module:
    """`paper_encoder`, shifted and scaled so that classes begin apart, however deep it stands.

    The paper's sigmoid layers begin with a third of the differences between classes that they get, so that
    a deep component needs hundreds of steps until its codes tell the classes apart. Here what the sigmoid
    gets has mean 0 and mean square 1 over classes.

    Example:
        >>> encoder = apart_encoder(torch.eye(10), 64)
        >>> round(encoder[0](torch.eye(10)).square().mean().item(), 4)
        1.0
    """
    encoder = paper_encoder(codes, width)
    layer: Any = encoder.get_submodule("0")
    with torch.no_grad():
        middle = codes.mean(0)
        square = (layer(codes) - layer(middle)).square().mean()
        if square > 0:  # there are several classes
            layer.weight /= square.sqrt()
            layer.bias.copy_(-layer.weight @ middle)
    return encoder


class AssociatedComponent(Component):
    """One component: forward f, bridge b, target encoder h, decoder g."""

    def __init__(
        self, block: nn.Module, bridge: nn.Module, encoder: nn.Module, target: int, code: int
    ) -> None:
        super().__init__()
        self.block = block  # f; enc.f in the authors' code
        self.bridge = bridge  # b
        self.encoder = encoder  # h; ae.g in the authors' code
        self.decoder = nn.Sequential(nn.Linear(code, target), nn.Sigmoid())  # g; ae.h in the authors' code
        he_normal_(self.decoder)
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.to(like)

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """``mse(b(s), t)`` for f and b, plus ``mse(g(t), t of before)`` for h and g."""
        assert signal.codes is not None
        s, codes = self.block(signal.s), self.encoder(signal.codes)
        associated = F.mse_loss(self.bridge(s), codes.detach()[signal.y])
        # all samples of a class have one code: encoded once, weighted by their number
        share = torch.bincount(signal.y, minlength=len(codes)).to(codes) / len(signal.y)
        errors = F.mse_loss(self.decoder(codes), signal.codes, reduction="none").mean(1)
        return Signal(s, signal.y, codes), associated + share @ errors

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The target's side learns at twice the rate."""
        return [
            {"params": [*self.block.parameters(), *self.bridge.parameters()]},
            {"params": [*self.encoder.parameters(), *self.decoder.parameters()], "rate": 2.0},
        ]


class AssociatedLearning(OneWayLearner):
    """Associated Learning for classification.

    Idea: the target is encoded step by step as the input is, and every component learns to lead from its
        activations to its own code of the target: no gradient crosses from one component to another.
    Equation: s = f(s_below), t = h(t_below), both inputs detached; f and b learn mse(b(s), t) with t
        detached, h and g learn mse(g(t), t_below). Prediction: g₁ ∘ … ∘ g_L ∘ b_L ∘ f_L ∘ … ∘ f₁.
    Use when: components shall train in a pipeline of processes, or with the memory of one of them.
    Do not use when: one process trains the network and it fits: the bridges cost more than they save.
    Layers: a chain of blocks that hand one tensor each on and share no parameter (`Blocks`; `split` cuts a
        model into such). Inside a block anything goes; a ``rule`` handles Linear and Conv1d to Conv3d, those
        of bridges, encoders and decoders too. Blocks end before the classifier.
    Cost: a bridge and a small autoencoder for each component; with the paper's bridges a step takes up to
        twice backpropagation's operations. The activations of one component at a time.
    Status: variant: encoders begin apart, since the paper's, whose deep codes look alike at first, need long
        trainings (``encoder=paper_encoder`` is the paper's). Codes are made once for each class, which
        changes no number. The published code's TensorFlow 1 Adam adds its eps elsewhere than torch's.
    Source: Kao, Chen, "Associated Learning: Decomposing End-to-end Backpropagation based on Auto-encoders and
        Target Propagation", Neural Computation 33(1), 2021, arXiv 1906.05560.
    Code: SamYWK/Associated_Learning (TensorFlow 1); Hibb-bb/AL, of a later paper on text.
    Results: the paper's abstract: about as accurate as backpropagation; its tables could not be read. Ours:
        95.0 against 94.1 % on 10,000 images of MNIST (MLP), 45.9 against 50.0 % on 3,000 of CIFAR-10
        (benchmarks/README.md); the paper's networks, made small, after 1,500 steps: 89.8 against 91.4 %
        (MLP), 35.6 against 39.0 % (CNN), 36.6 against 36.2 % (VGG), with encoders begun apart 89.5, 43.7 and
        48.8 % (benchmarks/reproduce/associated-learning.json).
    Limits: classification by class index. Codes hold nothing of the input: they are one row a class, so deep
        components see no more of the target than shallow ones. Sigmoids saturate at rates that other networks
        bear: on the digits Adam at 0.01 fails where 0.003 trains.

    Args:
        blocks: the forward maps f.
        num_classes: number of classes, C.
        code: width of every code, n (``neuron_num`` in the authors' code). Default 128. Range 16 to 256.
        bridge: makes b from the shape of a sample's activations and ``code``. Default `wide_bridge`,
            the paper's; `pooled_bridge` is cheaper on images.
        encoder: makes h from the codes that it gets to begin with, (C, below), and ``code``. Default
            `apart_encoder`; `paper_encoder` is the paper's.
        **training: what every `Learner` takes, by name. ``optimizer`` makes one for each component from its
            parameter groups and is required. ``scheduler`` makes one for each optimizer, to step after each
            step. ``rule`` makes one to act inside each component, such as ``pw.Foof``; default none, plain
            gradients. ``callbacks`` are called with a `Report` after each step. ``seed`` is of the
            components' random numbers (dropout, noise); default 0. The optimizer's rate is that of f and b; h
            and g learn at twice the rate, as in the paper.

    Raises:
        BlockError: see `Blocks`.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> blocks = pw.Blocks([nn.Sequential(nn.Linear(8, 16), nn.ELU()) for _ in range(1)], x)
        >>> adam = lambda groups: torch.optim.Adam(groups, lr=1e-2)
        >>> learner = pw.AssociatedLearning(blocks, num_classes=3, code=8, optimizer=adam)
        >>> losses = [learner.step(x, y).sum() for _ in range(100)]
        >>> bool(losses[-1] < losses[0] / 2)
        True
        >>> learner.predict(x).shape
        torch.Size([32, 3])
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        code: int = 128,
        bridge: MakeBridge = wide_bridge,
        encoder: MakeEncoder = apart_encoder,
        **training: Any,
    ) -> None:
        self._classes = num_classes
        components, codes = [], torch.eye(num_classes)
        for block, shape in zip(blocks, blocks.shapes[1:], strict=True):
            made, target = encoder(codes, code), codes.shape[1]
            with torch.no_grad():
                codes = made(codes)
            components.append(AssociatedComponent(block, bridge(shape, code), made, target, code))
        self._components = components
        super().__init__(components, **training)

    def signal(self, x: Tensor, y: Tensor) -> Signal:
        """The input, and one row for each class: t₀ is the one-hot target."""
        check_classes(y, self._classes)
        first = next(self._components[0].encoder.parameters())
        return Signal(x, y, torch.eye(self._classes, dtype=first.dtype, device=first.device))

    def as_module(self, depth: int | None = None) -> nn.Module:
        """The path of inference; with ``depth``, the shortcut through the first ``depth`` components."""
        return AssociatedPath(self._components[: len(self._components) if depth is None else depth])


class AssociatedPath(nn.Module):
    """``g₁ … g_d b_d f_d … f₁``: scores of the classes."""

    def __init__(self, components: list[AssociatedComponent]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(component.block for component in components))
        self.bridge = components[-1].bridge
        self.decoders = nn.Sequential(*(component.decoder for component in reversed(components)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, C), each in (0, 1)."""
        scores: Tensor = self.decoders(self.bridge(self.blocks(x)))
        return scores
