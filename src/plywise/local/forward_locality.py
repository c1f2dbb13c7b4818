"""Finds the losses of a block that a layer influences: its own patch's, its group of channels', or all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating


@dataclass(frozen=True)
class Locality:
    """Which losses a unit of a layer gets.

    Attributes:
        patch: its own position's alone.
        group: its own group of channels' alone.
    """

    patch: bool = False
    group: bool = False

    def estimates(self, u: Tensor, slopes: Tensor) -> Tensor:
        """Directions times the slopes that their units receive.

        Args:
            u: directions, like the layer's output, (N, channels, ...).
            slopes: of the losses, (N, groups, positions).
        """
        feedback = slopes if self.group else slopes.sum(1, keepdim=True)
        feedback = feedback if self.patch else feedback.sum(2, keepdim=True)
        groups, positions = feedback.shape[1:]
        # channels come before positions: (N, groups, channels of a group, positions)
        return (u.reshape(len(u), groups, -1, positions) * feedback.unsqueeze(2)).view_as(u)


def find_slopes(gradient: Tensor, tangent: Tensor, groups: int) -> Tensor:
    """How each patch's and group's share of the loss changes along the directions, (N, groups, positions)."""
    change = gradient * tangent
    channels = change.shape[1] if change.dim() > 1 else 1
    return change.reshape(len(change), groups, channels // groups, -1).sum(2)


def find_localities(
    block: nn.Module, layers: Iterable[nn.Module], s: Tensor, patches: bool, groups: int
) -> dict[nn.Module, Locality]:
    """Find the losses that each layer's units influence, by some of their gradients on a few samples.

    A layer that runs several times, or whose output has other positions than the block's, reaches all.

    Args:
        block: the block.
        layers: its layers with parameters.
        s: what the block gets.
        patches: whether each position has a loss of its own.
        groups: number of groups of channels with losses of their own; 1: none.
    """
    outputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        outputs[layer].append(output)

    handles = [layer.register_forward_hook(keep) for layer in outputs]
    try:
        with evaluating(block), torch.enable_grad():
            out = block(s[:2].clone().detach())  # which the block may change in place
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: Locality(
            patch=patches and len(zs) == 1 and _keeps(zs[0], out, out.shape[1], own_patch=True),
            group=groups > 1 and len(zs) == 1 and _keeps(zs[0], out, groups, own_patch=False),
        )
        for layer, zs in outputs.items()
    }


def _keeps(z: Any, out: Tensor, groups: int, *, own_patch: bool) -> bool:
    """Whether the first and last patch, or group, of ``out`` has no gradient outside its own in ``z``."""
    if not isinstance(z, Tensor) or not z.requires_grad or z.dim() < 2:
        return False
    if (z.shape[2:] != out.shape[2:]) if own_patch else z.shape[1] % groups:
        return False
    parts = _by_part(out, groups, own_patch)
    for part in (0, parts.shape[1] - 1):
        seed = torch.zeros_like(parts)
        seed[:, part] = torch.linspace(1, 2, seed[:, part].numel()).view_as(seed[:, part])
        (gradient,) = torch.autograd.grad((parts * seed).sum(), z, retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        found = _by_part(gradient, groups, own_patch)
        if bool(found[:, :part].any()) or bool(found[:, part + 1 :].any()):
            return False
    return True


def _by_part(tensor: Tensor, groups: int, by_patch: bool) -> Tensor:
    """(N, parts, ...): parts are positions, or groups of channels."""
    if by_patch:
        return tensor.flatten(2).transpose(1, 2) if tensor.dim() > 2 else tensor.unsqueeze(1)
    return tensor.unflatten(1, (groups, -1))
