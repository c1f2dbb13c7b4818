"""Local forward gradient: blocks learn from the slopes of their losses along random directions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

from plywise._util.checks import require_whole
from plywise.errors import BlockError
from plywise.local.blocks import Blocks
from plywise.local.component import Signal
from plywise.local.heads import MakeHead, pooled_linear
from plywise.local.learner import OneWayLearner, check_classes
from plywise.local.local_loss import LossComponent, headed_components

Draw = Callable[[Tensor], Tensor]
"""Draws directions like a layer's output: entries of mean 0 and variance 1, uncorrelated."""


class ForwardGradientComponent(LossComponent):
    """A block that learns by forward gradients; its head, or without one its output layer, does not."""

    def __init__(self, block: nn.Module, head: nn.Module | None, passes: int, draw: Draw) -> None:
        super().__init__(block, partial(F.cross_entropy, reduction="none"), head)
        self._passes = passes
        self._draw = draw
        known = _output_layer(block) if head is None else None
        self._layers = {layer: name for layer, name in _layers(block) if layer is not known}

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """The block's output and loss; the loss's gradient is exact for the head, estimated for the block."""
        samples = len(signal.y)
        s = signal.s.repeat(self._passes, *(1 for _ in signal.s.shape[1:]))
        y = signal.y.repeat(self._passes)
        nudged: list[tuple[Tensor, Tensor]] = []
        with forward_ad.dual_level(), self._nudging(nudged, len(y)):
            following, losses = super().forward(Signal(s, y))
            losses, slopes = forward_ad.unpack_dual(losses)
            output = forward_ad.unpack_dual(following.s).primal
        loss = losses.mean()
        if slopes is not None:
            slopes = slopes.detach() / len(y)
            for z, u in nudged:
                estimate = u * slopes.reshape(-1, *(1 for _ in u.shape[1:]))
                loss = loss + (estimate * (z - z.detach())).sum()  # adds 0; its gradient at z is the estimate
        return Signal(output[:samples], signal.y), loss

    @contextmanager
    def _nudging(self, nudged: list[tuple[Tensor, Tensor]], rows: int) -> Iterator[None]:
        """Push the layers' outputs along u; ``nudged`` gets each output, with that layer's graph, and u."""

        def nudge(name: str, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or output.shape[:1] != (rows,):
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise BlockError(
                    f"Layer {name!r} ({type(layer).__name__}) hands on {found} for {rows} samples. A forward "
                    "gradient needs one tensor with a row for each sample from every layer with parameters."
                )
            z, tangent = forward_ad.unpack_dual(output)
            if not z.requires_grad:  # frozen, or nobody asks for gradients
                return None
            u = self._draw(z.detach())
            nudged.append((z, u))
            return forward_ad.make_dual(z.detach(), u if tangent is None else u + tangent.detach())

        handles = [layer.register_forward_hook(partial(nudge, name)) for layer, name in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layers(module: nn.Module, name: str = "block") -> Iterator[tuple[nn.Module, str]]:
    """The outermost modules with parameters of their own: each learns by itself, whatever is inside."""
    if any(True for _ in module.parameters(recurse=False)) or is_parametrized(module):
        yield module, name
    else:
        for child_name, child in module.named_children():
            yield from _layers(child, f"{name}.{child_name}")


def _output_layer(block: nn.Module) -> nn.Module | None:
    """The module whose output is the block's, where that is sure and it is used once."""
    last = block
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    uses = sum(module is last for _, module in block.named_modules(remove_duplicate=False))
    return last if uses == 1 else None


class LocalForwardGradient(OneWayLearner):
    """Forward gradients with local losses, activity-perturbed.

    Idea: push the outputs of a block's layers along a random u and see by forward differentiation how each
        sample's local loss changes: the change times u is, on average, the gradient there. Blocks are
        short, so that few units share the noise, and no gradient is ever sent back through a layer.
    Equation: g_n = d/dε ℓ_n(z + εu), u ~ N(0, I) at the outputs z of all the block's layers with parameters;
        the estimate of ∂ℓ_n/∂z_n is g_n u_n, and ∇W = Σ_n (g_n u_n / N) a_nᵀ for a linear layer. Heads, and
        the layer that makes the prediction, follow their exact gradient. No gradient crosses blocks.
    Use when: you study learning without a backward pass.
    Do not use when: a network shall be trained: a backward pass within a block costs about as much and has
        no noise (`LocalLoss`).
    Layers: a chain of blocks that hand one tensor each on and share no parameter (`Blocks`; `split` cuts a
        model into such). A ``rule`` handles Linear and Conv1d to Conv3d. Every module with parameters of its
        own hands on one tensor with a row for each sample, and every operation knows forward differentiation.
        The last block's output is one score for each class.
    Cost: a forward with dual numbers, two to three times a plain one, and each layer's own gradient, times
        ``passes``; a head for each block. The activations of one block at a time. Of one sample's gradient
        g, the estimate is off by E‖ĝ-g‖² = (q+1)‖g‖², q the block's units; a batch of N divides it by N.
    Status: variant: of the paper's losses only those of whole blocks, not those of each patch and group of
        channels, which make q small; any network in place of LocalMixer. Heads follow their exact gradient,
        as in the paper.
    Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023,
        arXiv 2210.03310.
    Code: google-research/google-research, folder local_forward_gradient (JAX).
    Results: the paper's abstract: level with backpropagation on MNIST and CIFAR-10, with its patch and group
        losses. Not reproduced here, without them: 84.7 against backpropagation's 94.1 % on 10,000 images of
        MNIST (MLP), 24.7 against 50.0 % on 3,000 of CIFAR-10 (benchmarks/README.md).
    Limits: noise grows with the gradient, so that a rate must be small against N/q: it diverges where
        backpropagation does not, less so with layer norm, which the paper has everywhere (one with weights of
        its own is a layer too, with noise of its own). What a sample does to the losses of others (batch norm
        in training) is left out of its gradient.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        head: makes a head from the shape of a sample's activations and C. Default `pooled_linear`.
        passes: directions to average over, by as many copies of the batch. Default 1. Range 1 to 16.
        draw: draws u like a layer's output, with uncorrelated entries of mean 0 and variance 1. Default
            ``torch.randn_like``; random signs have less variance, q - 1.
        **training: what every `Learner` takes, by name. ``optimizer`` makes one for each component from its
            parameter groups and is required. ``scheduler`` makes one for each optimizer, to step after each
            step. ``rule`` makes one to act inside each component, such as ``pw.Foof``; default none, plain
            gradients. ``callbacks`` are called with a `Report` after each step. ``seed`` is of the
            components' random numbers (dropout, noise); default 0.

    Raises:
        BlockError: the last block does not hand on a score for each class; at a step: a layer hands on
            something else than one tensor with a row for each sample, or a head changes activations in place.
        ValueError: ``passes`` is no whole number above 0.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 3
        >>> body, top = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.2)
        >>> blocks = pw.Blocks([body, top], x)
        >>> learner = pw.LocalForwardGradient(blocks, num_classes=3, passes=4, optimizer=sgd)
        >>> losses = [learner.step(x, y) for _ in range(200)]
        >>> (losses[-1] < losses[0] / 2).tolist()
        [True, True]
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        *,
        head: MakeHead = pooled_linear,
        passes: int = 1,
        draw: Draw = torch.randn_like,
        **training: Any,
    ) -> None:
        require_whole(self, passes=passes)
        self._blocks, self._classes = blocks, num_classes
        parts = headed_components(blocks, num_classes, head, F.cross_entropy)
        components = [ForwardGradientComponent(part.block, part.head, passes, draw) for part in parts]
        super().__init__(components, **training)

    def signal(self, x: Tensor, y: Tensor) -> Signal:
        """The batch as it is."""
        check_classes(y, self._classes)
        return Signal(x, y)

    def as_module(self) -> nn.Module:
        """The blocks, one after another."""
        return nn.Sequential(*self._blocks)
