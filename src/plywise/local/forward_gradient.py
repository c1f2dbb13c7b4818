"""Local forward gradient: blocks learn from the slopes of their losses along random directions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized

from plywise._util.checks import require_kind, require_whole
from plywise.data.batches import map_tensors
from plywise.errors import BlockError
from plywise.local.blocks import Blocks, hide_padding, require_blocks
from plywise.local.component import Signal
from plywise.local.forward_locality import Locality, find_localities, find_slopes
from plywise.local.heads import MakeHead, pooled_linear
from plywise.local.learner import OneWayLearner, PredictsByBlocks
from plywise.local.local_loss import (
    Loss,
    LossComponent,
    make_headed_components,
    refuse_positions,
    require_loss,
)

Draw = Callable[[Tensor], Tensor]
"""Draws directions like a layer's output: entries of mean 0 and variance 1, uncorrelated."""


def draw_normal(z: Tensor) -> Tensor:
    """Draw from N(0, I), in the layout of ``z``.

    torch draws much faster into contiguous memory, which the outputs of norms over channels do not have.

    Example:
        >>> draw_normal(torch.zeros(4, 8, 3).transpose(1, 2)).stride()
        (24, 1, 3)
    """
    like = torch.empty_like(z)
    drawn = torch.randn(z.numel(), dtype=z.dtype, device=z.device)
    return drawn.as_strided(like.size(), like.stride())


@dataclass
class Nudged:
    """A layer's output in a forward with dual numbers.

    Attributes:
        layer: the layer.
        z: its output, with the layer's own graph.
        u: the direction along which it is pushed.
        pushed: the dual number that goes on.
        alive: where a ReLU lets it through; None where none follows.
    """

    layer: nn.Module
    z: Tensor
    u: Tensor
    pushed: Tensor
    alive: Tensor | None = None


class ForwardGradientComponent(LossComponent):
    """A block that learns by forward gradients; its head, or without one its output layer, does not."""

    def __init__(self, part: LossComponent, passes: int, draw: Draw, patches: bool, groups: int) -> None:
        super().__init__(part.block, part._loss, part.head, part._numbers)
        self._passes, self._draw = passes, draw
        self._patches, self._groups = patches, groups
        known = _output_layer(part.block) if part.head is None else None
        self._layers = {layer: name for layer, name in _layers(part.block) if layer is not known}
        self._relus = [module for module in part.block.modules() if isinstance(module, nn.ReLU)]
        self._localities: dict[nn.Module, Locality] | None = None

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """The block's output and loss; the loss's gradient is exact for the head, estimated for the block."""
        samples = len(signal.y)
        several = replace(
            signal,
            s=self._repeat(signal.s),
            y=self._repeat(signal.y),
            carried=map_tensors(self._repeat, signal.carried),
        )
        y, nudged = several.y, list[Nudged]()
        with forward_ad.dual_level(), _differentiable_forward(self.block), self._nudging(nudged, len(y)):
            output, tangent = forward_ad.unpack_dual(several.through(self.block))
        if tangent is None:
            return replace(signal, s=output[:samples]), self.measure_loss(output, y, several.carried)
        # no leaf: a head may change its input in place, which torch refuses for leaves
        judged = output if output.requires_grad else output + output.new_zeros((), requires_grad=True)
        loss = self.measure_loss(judged, y, several.carried)
        (gradient,) = torch.autograd.grad(loss, judged, retain_graph=True)
        slopes = find_slopes(gradient, tangent.detach(), self._parts(output))
        for one in nudged:
            u = one.u if one.alive is None else one.u * one.alive
            estimate = self._locality(one.layer, signal.s).estimates(u, slopes)
            estimate = hide_padding(estimate, several.carried)  # whose true gradient is 0
            loss = loss + (estimate * (one.z - one.z.detach())).sum()  # adds 0; its gradient is the estimate
        return replace(signal, s=output[:samples]), loss

    def _repeat(self, part: Tensor) -> Tensor:
        """Return a row of the batch for each pass."""
        return part.repeat(self._passes, *(1 for _ in part.shape[1:]))

    def _parts(self, output: Tensor) -> int:
        """Groups of channels with slopes of their own; the scores of the classes are one group."""
        if self.head is None:
            return 1
        if output.shape[1] % self._groups:
            raise BlockError(
                f"A {type(self.block).__name__} hands on {output.shape[1]} channels, which groups="
                f"{self._groups} does not divide. Choose a divisor of the channels of all blocks."
            )
        return self._groups

    def _locality(self, layer: nn.Module, s: Tensor) -> Locality:
        """Return which of the block's losses a layer receives; found once."""
        if self._localities is None:
            split = self.head is not None and (self._patches or self._groups > 1)
            found = find_localities(self.block, self._layers, s, self._patches, self._groups) if split else {}
            self._localities = found
        return self._localities.get(layer, Locality())

    @contextmanager
    def _nudging(self, nudged: list[Nudged], rows: int) -> Iterator[None]:
        """Push the layers' outputs along u, and see which of them a ReLU lets through."""

        def nudge(name: str, layer: nn.Module, args: Any, outputs: Any) -> Any:
            several = isinstance(outputs, tuple) and len(outputs) > 0  # of attention and recurrent layers
            output = outputs[0] if several else outputs
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
            pushed = forward_ad.make_dual(z.detach(), u if tangent is None else u + tangent.detach())
            nudged.append(Nudged(layer, z, u, pushed))
            return (pushed, *outputs[1:]) if several else pushed

        def let_through(relu: nn.Module, args: Any) -> None:
            for one in nudged:
                if args and one.pushed is args[0]:
                    one.alive = one.z.detach() > 0

        handles = [layer.register_forward_hook(partial(nudge, name)) for layer, name in self._layers.items()]
        handles += [relu.register_forward_pre_hook(let_through) for relu in self._relus]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _differentiable_forward(block: nn.Module) -> Iterator[None]:
    """Plain attention and recurrent layers, not torch's fused ones, which know no forward derivative."""
    # torch.backends.mkldnn.enabled cannot be set once torch's own test tools have been imported
    fused = torch._C._get_mkldnn_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in block.modules())
    with sdpa_kernel(SDPBackend.MATH):
        try:
            torch._C._set_mkldnn_enabled(fused and not recurrent)
            yield
        finally:
            torch._C._set_mkldnn_enabled(fused)


def _layers(module: nn.Module, name: str = "block") -> Iterator[tuple[nn.Module, str]]:
    """Yield the outermost modules with parameters of their own: each learns by itself, whatever is inside."""
    if any(True for _ in module.parameters(recurse=False)) or is_parametrized(module):
        yield module, name
    else:
        for child_name, child in module.named_children():
            yield from _layers(child, f"{name}.{child_name}")


def _refuse_compiled(blocks: Blocks) -> None:
    """Raise BlockError if a block is compiled: compiled code runs no hooks and drops forward derivatives."""
    for number, block in enumerate(blocks):
        for module in block.modules():
            if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
                raise BlockError(
                    f"Block {number} is compiled, and compiled code knows no forward derivative, from which "
                    "LocalForwardGradient learns. Give the block as it was before torch.compile."
                )


def _output_layer(block: nn.Module) -> nn.Module | None:
    """Return the module whose output is the block's, where that is sure and it is used once."""
    last = block
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    uses = sum(module is last for _, module in block.named_modules(remove_duplicate=False))
    return last if uses == 1 else None


class LocalForwardGradient(PredictsByBlocks, OneWayLearner):
    """Forward gradients with local losses, activity-perturbed.

    Idea: push the outputs of a block's layers along a random u and see by forward differentiation how each
        sample's local loss changes: the change times u is, on average, the gradient there. Blocks are
        short, so that few units share the noise, and no gradient is ever sent back through a layer.
    Equation: g_n = d/dε ℓ_n(z + εu), u ~ N(0, I) at the outputs z of all the block's layers with parameters;
        the estimate of ∂ℓ_n/∂z_n is g_n u_n, and ∇W = Σ_n (g_n u_n / N) a_nᵀ for a linear layer. With
        ``patches`` and ``groups``, g_n = Σ g_npk is the sum of the shares of patch p and group of
        channels k of the block's output, and a unit that reaches only these gets u g_npk. u is 0 where the
        ReLU that follows is off. Heads, and the layer that makes the prediction, follow their exact gradient.
        No gradient crosses blocks.
    Use when: you study learning without a backward pass.
    Do not use when: you want a trained network: a backward pass within a block costs about as much and has no
        noise (`LocalLoss`).
    Layers: a chain of blocks, each of which passes one tensor to the next, without shared parameters
        (`Blocks`; `split` makes them from a model). A ``rule`` handles their calls of linear maps. Every
        module with parameters of its own hands on a tensor with a row for each sample, and every operation
        knows forward differentiation; of several tensors, as attention and recurrent layers hand on, the
        first is pushed. The last block's output is one score for each class.
    Cost: a forward with dual numbers, two to three times a plain one, and each layer's own gradient, times
        ``passes``; a head for each block. The activations of one block at a time. Of one sample's gradient
        g, the estimate is off by E‖ĝ-g‖² = (q+1)‖g‖², q the units that share a loss and that ReLUs let
        through: the block's, or with ``patches`` and ``groups`` those of one patch and group. A batch of N
        divides it by N.
    Status: variant: any network (`plywise.local.local_mixer` makes the paper's); g_npk are products of the
        exact gradient at the block's output and its tangent, where the paper's heads have a forward rule that
        gives the same. Heads follow their exact gradient, as in the paper.
    Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023,
        arXiv 2210.03310.
    Code: google-research/google-research, folder local_forward_gradient (JAX).
    Results: the paper's abstract: level with backpropagation on MNIST and CIFAR-10, with its patch and group
        losses. Not reproduced here: on a small LocalMixer and 10,000 images of CIFAR-10, 1,200 steps, one
        seed, 40.3 % of the test images against backpropagation's 44.1 and 45.9 at two rates (of the training
        images 39.9 against 53.5 and 59.7, so it is behind in learning, not in generalising), at 2.3 times its
        CPU time (benchmarks/local_mixer.json). One sample's relative error in a layer of 1,018 units: 1,019;
        9 with a loss for each patch and group of 8 units; 5 where ReLUs let half through (tests). Without
        patches and groups: 84.7 against backpropagation's 94.1 % on 10,000 images of MNIST (MLP), 24.7
        against 50.0 % on 3,000 of CIFAR-10, 22.4 against 51.6 % on 10,000 with eight blocks of one
        convolution each (benchmarks/README.md).
    Limits: noise grows with the gradient, so that a rate must be small against N/q: it diverges where
        backpropagation does not, less so with layer norm, which the paper has everywhere (a norm with weights
        is a layer too, and has its own noise). The effect of a sample on the losses of others (batch norm in
        training) is not in its gradient.

    Args:
        blocks: the network. The last block's output is the prediction, a score for each class.
        num_classes: number of classes, C.
        head: makes a head from the shape of a sample's activations and C. Default `pooled_linear`.
        passes: directions to average over, by as many copies of the batch. Default 1. Range 1 to 16.
        draw: draws u like a layer's output, with uncorrelated entries of mean 0 and variance 1. Default
            `draw_normal`; random signs have less variance, q - 1.
        patches: whether each position of a block's output, (N, channels, ...), has its own share of the loss,
            which layers that mix no positions follow. Default False.
        groups: number of groups of channels with their own shares, as ``patches``; it divides the channels.
            Default 1. Range 1 to 64.
        loss: of scores and targets, a scalar. With the default, cross-entropy, targets are class indices
            and are checked; another loss gets them as they are.
        local_loss: of what the heads make of all blocks but the last, and targets; default ``loss``. With
            ``plywise.local.scpl.contrastive_loss`` and ``head=plywise.local.scpl.mlp_projection`` blocks
            contrast samples.
        **training: what every `Learner` takes, by name: ``optimizer`` (required), ``scheduler``, ``rule``,
            ``callbacks`` and ``seed``.

    Raises:
        BlockError: the last block does not hand on a score for each class, or a block is compiled; at a step:
            a layer hands on something else than one tensor with a row for each sample, a head changes
            activations in place, or ``groups`` does not divide the channels.
        ValueError: ``passes`` or ``groups`` is not a whole number above 0.

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
        draw: Draw = draw_normal,
        patches: bool = False,
        groups: int = 1,
        loss: Loss = F.cross_entropy,
        local_loss: Loss | None = None,
        **training: Any,
    ) -> None:
        require_blocks(self, blocks)
        require_whole(self, passes=passes, groups=groups)
        require_kind(self, "patches", patches, bool, "True or False")
        for given in (loss, loss if local_loss is None else local_loss):
            require_loss(self, given)
        refuse_positions(self, loss, blocks.shapes[-1], num_classes)
        _refuse_compiled(blocks)
        if patches or groups > 1:
            why = "a loss of each patch or group is traced through a block of one tensor"
            blocks.refuse_carrying(type(self).__name__, why)
        self._blocks, self._classes, self._loss = blocks, num_classes, loss
        parts = make_headed_components(blocks, num_classes, head, loss if local_loss is None else local_loss)
        parts[-1] = LossComponent(blocks[-1], loss)
        components = [ForwardGradientComponent(part, passes, draw, patches, groups) for part in parts]
        super().__init__(components, **training)
