"""Associated Learning: every component encodes input and target, and learns to predict the target's code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import (
    describe_kind,
    is_list,
    make_part,
    require_choice,
    require_kind,
    require_whole,
)
from plywise.data.batches import Batch
from plywise.errors import DataError
from plywise.local.associated_maps import (
    MakeBridge,
    MakeDecoder,
    MakeEncoder,
    Range,
    apart_encoder,
    check_ranges,
    find_output_range,
    linear_decoder,
    paper_encoder,
    pooled_bridge,
    sigmoid_decoder,
    wide_bridge,
)
from plywise.local.blocks import Blocks, chain_blocks, hide_padding, require_blocks
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner, check_classes
from plywise.local.local_loss import Loss, compute_loss, require_loss

__all__ = [
    "AssociatedLearning",
    "MakeBridge",
    "MakeEncoder",
    "apart_encoder",
    "paper_encoder",
    "pooled_bridge",
    "wide_bridge",
]

MAPS = ("block", "bridge", "encoder", "decoder")
TARGETS = ("classes", "labels", "numbers")


class AssociatedComponent(Component):
    """One component: forward f, bridge b, target encoder h, decoder g.

    Args:
        block: f; ``enc.f`` in the authors' code.
        bridge: b.
        encoder: h; ``ae.g`` in the authors' code.
        decoder: g; ``ae.h`` in the authors' code.
        loss: of the decoder's output and the targets, in the first component; None for mean squared error.
        detach: whether b learns towards codes that do not learn from that.
        decay: weight decay of each map, by its name above.
    """

    def __init__(
        self,
        block: nn.Module,
        bridge: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        loss: Loss | None = None,
        detach: bool = True,
        decay: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.block, self.bridge, self.encoder, self.decoder = block, bridge, encoder, decoder
        self._loss, self._detach, self._decay = loss, detach, dict(decay or {})
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.to(like)

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """``mse(b(s), t)`` for f and b, plus ``mse(g(t), t of before)`` for h and g."""
        assert signal.codes is not None
        s, codes = signal.through(self.block), self.encoder(signal.codes)
        target = codes.detach() if self._detach else codes
        if not signal.y.is_floating_point():
            target = target[signal.y]
        associated = F.mse_loss(self.bridge(hide_padding(s, signal.carried)), target)
        return replace(signal, s=s, codes=codes), associated + self._measure_rebuilding(
            codes, signal.codes, signal.y
        )

    def _measure_rebuilding(self, codes: Tensor, below: Tensor, y: Tensor) -> Tensor:
        """Return the decoder's error in reconstructing the encoder's input."""
        found = self.decoder(codes)
        if self._loss is not None:
            return compute_loss(self._loss, found if y.is_floating_point() else found[y], y)
        if y.is_floating_point():
            return F.mse_loss(found, below)
        # all samples of a class have one code: encoded once, weighted by their number
        share = torch.bincount(y, minlength=len(codes)).to(codes) / len(y)
        return share @ F.mse_loss(found, below, reduction="none").mean(1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups: the target's side learns at twice the rate."""
        if not self._decay:
            return [
                {"params": [*self.block.parameters(), *self.bridge.parameters()]},
                {"params": [*self.encoder.parameters(), *self.decoder.parameters()], "rate": 2.0},
            ]
        return [
            {
                "params": list(self.get_submodule(name).parameters()),
                "rate": 2.0 if name in ("encoder", "decoder") else 1.0,
                "weight_decay": self._decay.get(name, 0.0),
            }
            for name in MAPS
        ]


class AssociatedLearning(OneWayLearner):
    """Associated Learning, for classes, several labels at once, or numbers.

    Idea: the target is encoded step by step, as the input is. Every component learns to predict its own code
        of the target from its activations, and no gradient crosses from one component to another.
    Equation: s = f(s_below), t = h(t_below), both inputs detached; f and b learn mse(b(s), t) with t
        detached, h and g learn mse(g(t), t_below). Prediction: g₁ ∘ … ∘ g_L ∘ b_L ∘ f_L ∘ … ∘ f₁.
    Use when: you train components in a pipeline of processes, or have memory for one component only.
    Do not use when: one process trains the network and it fits: the bridges cost more than they save.
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A block may contain any modules; a ``rule`` handles their
        calls of linear maps, those of bridges, encoders and decoders too. Blocks end before the classifier.
    Cost: a bridge and a small autoencoder for each component; with the paper's bridges a step takes up to
        twice backpropagation's operations. The activations of one component at a time.
    Status: variant: encoders are initialised so that the codes of classes differ. The deep codes of the
        paper's encoders are nearly equal at first and need long training (``encoder=paper_encoder`` is the
        paper's). ``decoder=mean_decoder``, ours too, makes decoders begin at the mean of what they rebuild,
        which saves steps; the arena and the demo take it. The authors' later code for text is
        `plywise.local.associated_text`, with tanh maps, ``loss`` and ``detach_target=False``. Codes are made
        once for each class, which changes no number. The published code's TensorFlow 1 Adam adds its eps
        elsewhere than torch's.
    Source: Kao, Chen, "Associated Learning: Decomposing End-to-end Backpropagation based on Auto-encoders and
        Target Propagation", Neural Computation 33(1), 2021, arXiv 1906.05560.
    Code: SamYWK/Associated_Learning (TensorFlow 1); Hibb-bb/AL, of a later paper on text.
    Results: the paper's abstract: about as accurate as backpropagation; its tables could not be read. Ours:
        95.0 against 94.1 % on 10,000 images of MNIST (MLP), 45.9 against 50.0 % on 3,000 of CIFAR-10, 42.6 %
        (44.6 with ``mean_decoder``) against 51.6 % on 10,000 with eight blocks of one convolution each
        (benchmarks/README.md); the paper's networks, made small, after 1,500 steps: 89.8 against 91.4 %
        (MLP), 35.6 against 39.0 % (CNN), 36.6 against 36.2 % (VGG), with our initialisation of encoders 89.5,
        43.7 and 48.8 %; the CNN after 50 epochs 54.0 against 54.2 % (one seed), at 3.8 times the CPU time
        (benchmarks/reproduce/README.md). On CNNs the last depth is worse in
        short training, since it learns last: 51.8, 54.0, 50.7 and 47.3 % by depth after 6 epochs of a VGG on
        3,000 images of CIFAR-10, 59.6, 60.8, 59.7 and 59.5 after 18 (one seed,
        benchmarks/associated_depth.json).
    Limits: codes depend on the target alone: with classes there is one code for each class, so that deep
        components get no more information on the target than shallow ones. Sigmoids saturate at rates that
        suit other networks: on the digits Adam fails at 0.01 and trains at 0.003.

    Args:
        blocks: the forward maps f.
        num_classes: number of classes, C; with other ``targets``, of labels or numbers a sample.
        code: width of every code, n (``neuron_num`` in the authors' code). Default 128. Range 16 to 256.
        bridge: makes b from the shape of a sample's activations and ``code``. Default `wide_bridge`,
            the paper's; `pooled_bridge` is cheaper on images. A list holds one for each block.
        encoder: makes h from the codes that it gets at the beginning, (C, below), and ``code``. Default
            `apart_encoder`; `paper_encoder` is the paper's.
        decoder: makes g from the codes that it gets at the beginning, (C, code), and those that it has to
            rebuild, (C, below). Default `sigmoid_decoder`, the paper's; for short trainings `mean_decoder`.
            Bridge, encoder and decoder must be of a kind: `plywise.local.associated_maps` has those of tanh
            too, which are the authors' for text.
        targets: "classes": a class index a sample; "labels": (N, C) of 0 and 1, several may be 1; "numbers":
            (N, C) of any numbers, best standardised. With numbers, the first decoder is linear.
        loss: of the first decoder's output and the targets, such as ``F.cross_entropy``, which the authors
            have for text. Default mean squared error, the paper's.
        detach_target: whether codes are constants in the loss of b. Default True, the paper's. Of the
            authors' codes for text one has it True (model.py), the other False (associated_learning).
        decay: weight decay for each map, of "block", "bridge", "encoder" and "decoder": the optimizer's
            ``weight_decay``, which it must know. The paper has 1e-4 on the blocks of its ResNets. Default
            none.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``. The optimizer's rate is that of f and b; h and g learn at twice the
            rate, as in the paper.

    Raises:
        BlockError: the range of a bridge or decoder does not contain its targets.
        PlywiseError: at a step, targets are not what ``targets`` says.
        ValueError: ``targets`` or a name in ``decay`` is unknown, a number of classes or width is not a whole
            number above 0, or there are not as many bridges as blocks.

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
        bridge: MakeBridge | Sequence[MakeBridge] = wide_bridge,
        encoder: MakeEncoder = apart_encoder,
        decoder: MakeDecoder = sigmoid_decoder,
        targets: str = "classes",
        loss: Loss | None = None,
        detach_target: bool = True,
        decay: Mapping[str, float] | None = None,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_whole(self, num_classes=num_classes, code=code)
        require_choice(self, "targets", targets, TARGETS)
        if decay is not None:
            require_kind(self, "decay", decay, Mapping, "a dict of numbers by name")
        for name in decay or ():
            require_choice(self, "a name in decay", name, MAPS)
        require_loss(self, F.mse_loss if loss is None else loss)
        self._blocks, self._classes, self._targets = blocks, num_classes, targets
        decoders = [decoder] * len(blocks)
        if targets == "numbers":
            decoders[0] = linear_decoder
        makers = zip(_list_bridges(bridge, len(blocks)), [encoder] * len(blocks), decoders, strict=True)
        codes, below = _first_codes(num_classes, targets), _first_range(targets, loss)
        maps = _make_maps(blocks.shapes[1:], makers, code, codes, below)
        self._components = [
            AssociatedComponent(block, *own, detach=detach_target, decay=decay, loss=None if number else loss)
            for number, (block, own) in enumerate(zip(blocks, maps, strict=True))
        ]
        super().__init__(self._components, **training)

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return the input, and t₀: one row for each class, or each sample's labels or numbers."""
        first = next(self._components[0].encoder.parameters())
        if self._targets == "classes":
            check_classes(y, self._classes)
            codes = torch.eye(self._classes, dtype=first.dtype, device=first.device)
            return replace(self._blocks.begin(x, y), codes=codes)
        if y.shape[1:] != (self._classes,):
            raise DataError(
                f"Targets must be {self._classes} {self._targets} a sample, not of shape {tuple(y.shape)}."
            )
        y = y.to(first)
        if self._targets == "labels" and bool(((y != 0) & (y != 1)).any()):
            raise DataError("Labels must be 0 or 1, and this batch holds others.")
        return replace(self._blocks.begin(x, y), codes=y)

    def as_module(self, depth: int | None = None) -> nn.Module:
        """The path of inference; with ``depth``, the shortcut through the first ``depth`` components."""
        return AssociatedPath(self._components[:depth])


class AssociatedPath(nn.Module):
    """``g₁ … g_d b_d f_d … f₁``: scores of the classes, or the targets' numbers."""

    def __init__(self, components: list[AssociatedComponent]) -> None:
        super().__init__()
        self.blocks = chain_blocks(component.block for component in components)
        self.bridge = components[-1].bridge
        self.decoders = nn.Sequential(*(component.decoder for component in reversed(components)))

    def forward(self, x: Batch) -> Tensor:
        """Scores (N, C), in the first decoder's range."""
        return self.decoders(self.bridge(hide_padding(self.blocks(x), x)))


def _list_bridges(bridge: MakeBridge | Sequence[MakeBridge], blocks: int) -> list[MakeBridge]:
    """Return a function for each block."""
    if not callable(bridge) and not is_list(bridge):
        raise TypeError(
            f"AssociatedLearning: bridge must be a function, or a list of them, not {describe_kind(bridge)}."
        )
    bridges = [bridge] * blocks if callable(bridge) else list(bridge)
    if len(bridges) != blocks:
        raise ValueError(
            f"AssociatedLearning: bridge is a list of {len(bridges)} for {blocks} blocks; give a function "
            "for each block, or one function for all."
        )
    return bridges


def _make_maps(
    shapes: Sequence[torch.Size],
    makers: Iterable[tuple[MakeBridge, MakeEncoder, MakeDecoder]],
    code: int,
    codes: Tensor,
    below: Range | None,
) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Make each component's bridge, encoder and decoder.

    Args:
        shapes: the shapes of the blocks' outputs.
        makers: the functions that make the three, for each component.
        code: the size of a code.
        codes: what the first encoder encodes.
        below: the range of what the first decoder has to rebuild, if it is known.
    """
    components = []
    for number, (shape, (make_bridge, make_encoder, make_decoder)) in enumerate(
        zip(shapes, makers, strict=True)
    ):
        encoder = make_part("AssociatedLearning: encoder", make_encoder, codes, code, kind=nn.Module)
        bridge = make_part("AssociatedLearning: bridge", make_bridge, shape, code, kind=nn.Module)
        with torch.no_grad():
            above = encoder(codes)
        decoder = make_part("AssociatedLearning: decoder", make_decoder, above, codes, kind=nn.Module)
        maps = bridge, encoder, decoder
        check_ranges(number, *maps, below)
        codes, below = above, find_output_range(encoder)
        components.append(maps)
    return components


def _first_range(targets: str, loss: Loss | None) -> Range | None:
    """The range of what the first decoder has to rebuild; None where a loss decides what its output means."""
    if loss is not None:
        return None
    return (-torch.inf, torch.inf) if targets == "numbers" else (0.0, 1.0)


def _first_codes(classes: int, targets: str) -> Tensor:
    """Make the codes that encoders are initialised with: every class, or a sample of likely targets."""
    if targets == "classes":
        return torch.eye(classes)
    sample = torch.randn(64, classes)
    return sample if targets == "numbers" else (sample > 0).to(sample)
