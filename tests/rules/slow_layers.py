"""Layers that answer a backward by dense matrices: the definition of CWU and of exact back-matching."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 0.1
CG_STEPS = 8


@dataclass
class Slow:
    """What a network's layers answer, written out.

    Attributes:
        samples: the batch size, by which a mean loss is multiplied.
        centres: whether the weights are solved for on centred rows, and the bias after it (back-matching); if
            not, the bias is a column of ones (CWU).
        matches: whether the layer below gets the value that explains Δ; if not, ``ΔW``.
        takes: whether a layer of this kind is solved for; if not, its update is G.
        updates: the updates by parameter.
    """

    samples: int
    centres: bool
    matches: bool
    takes: Callable[[str], bool]
    updates: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def linear(self, a: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        def read(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            return a.reshape(1, -1, a.shape[-1]), delta.reshape(1, -1, delta.shape[-1])

        def match(a: Tensor, delta: Tensor) -> Tensor:
            damping = EPS * weight.square().sum() / min(weight.shape)
            return delta @ weight @ torch.linalg.inv(weight.T @ weight + damping * torch.eye(weight.shape[1]))

        return self._call("linear", a, weight, bias, F.linear, read, match)

    def conv(self, a: Tensor, layer: nn.Conv2d) -> Tensor:
        how = {"stride": layer.stride, "padding": layer.padding}

        def apply(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(a, weight, bias, **how)

        def read(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            patches = F.unfold(a, layer.kernel_size, **how).mT
            return patches.reshape(1, -1, patches.shape[2]), delta.flatten(2).mT.reshape(
                1, -1, delta.shape[1]
            )

        def match(a: Tensor, delta: Tensor) -> Tensor:
            def apply_flat(v: Tensor) -> Tensor:
                return apply(v.reshape(1, *a.shape[1:]), layer.weight, None).flatten()

            J = torch.autograd.functional.jacobian(apply_flat, torch.zeros(a[0].numel()))
            damping = EPS * J.square().sum() / min(J.shape)
            M = J.T @ J + damping * torch.eye(J.shape[1])
            return torch.stack([descend(M, J.T @ d.flatten()) for d in delta]).reshape(a.shape)

        return self._call("conv", a, layer.weight, layer.bias, apply, read, match)

    def affine(self, a: Tensor, layer: nn.Module, axis: int) -> Tensor:
        """The scale and shift of a norm: a layer of one input for each feature."""

        def spread(part: Tensor) -> Tensor:
            return part.reshape(-1, *[1] * (a.dim() - 1 - axis)) if axis == 1 else part

        def apply(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return a * spread(weight) + (0 if bias is None else spread(bias))

        def read(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            first = (a.movedim(axis, 0), delta.movedim(axis, 0))
            return tuple(part.reshape(len(part), -1, 1) for part in first)

        return self._call("norm", a, layer.weight, layer.bias, apply, read, None)

    def embedding(self, indices: Tensor, layer: nn.Embedding) -> Tensor:
        one_hot = F.one_hot(indices, layer.num_embeddings).double()

        def read(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            return a.reshape(1, -1, a.shape[-1]), delta.reshape(1, -1, delta.shape[-1])

        def apply(a: Tensor, weight: Tensor, bias: None) -> Tensor:
            return a @ weight

        return self._call("embedding", one_hot, layer.weight, None, apply, read, None, transposed=True)

    def _call(self, kind, a, weight, bias, apply, read, match, transposed=False) -> Tensor:
        def answer(a: Tensor, delta: Tensor) -> Tensor | None:
            rows, targets = read(a, delta)
            D, b = self._solve(rows, targets, bias is not None, self.takes(kind))
            D = D.mT if transposed else D
            for parameter, update in ((weight, D), (bias, b)):
                if parameter is not None:
                    self.updates[parameter] = self.updates.get(parameter, 0) + update.reshape(parameter.shape)
            with torch.enable_grad():
                point = a.detach().requires_grad_()
                plain = torch.autograd.grad(apply(point, weight.detach(), None), point, delta)[0]
            return match(a, delta) if match is not None and self.matches else plain

        with torch.no_grad():
            out = apply(a, weight, bias)
        return Answered.apply(a if a.requires_grad else a.detach().requires_grad_(), out, answer)

    def _solve(self, A: Tensor, T: Tensor, has_bias: bool, takes: bool) -> tuple[Tensor, Tensor]:
        """The update (g, m, d) and that of the bias (g, m)."""
        if not takes:
            return T.mT @ A, T.sum(1)
        T, n = self.samples * T, A.shape[1]
        mean, mean_target = A.mean(1, keepdim=True), T.mean(1, keepdim=True)
        if has_bias and self.centres:
            D = ridge(A - mean, T - mean_target, min(n, A.shape[2]))
            return D, (mean_target.mT - D @ mean.mT).squeeze(2)
        if not has_bias:
            return ridge(A, T, min(A.shape[1:])), T.sum(1)
        D = ridge(torch.cat([A, torch.ones_like(A[..., :1])], 2), T, min(n, A.shape[2] + 1))
        return D[..., :-1], D[..., -1]


class Answered(torch.autograd.Function):
    """An output that was computed elsewhere, whose backward is a function."""

    @staticmethod
    def forward(ctx, a, out, answer):
        ctx.save_for_backward(a)
        ctx.answer = answer
        return out.clone()

    @staticmethod
    def backward(ctx, delta):
        return ctx.answer(*ctx.saved_tensors, delta), None, None


def ridge(A: Tensor, T: Tensor, size: int) -> Tensor:
    """``TᵀA (AᵀA + λI)⁻¹`` of each group, λ relative to ‖A‖² / size."""
    damping = EPS * A.square().sum((1, 2)) / size
    M = A.mT @ A + damping[:, None, None] * torch.eye(A.shape[2])
    return T.mT @ A @ torch.linalg.inv(M)


def descend(M: Tensor, right: Tensor) -> Tensor:
    """The textbook's conjugate gradients, from zero."""
    solution, residual, direction = torch.zeros_like(right), right, right
    for _ in range(CG_STEPS):
        alpha = residual @ residual / (direction @ M @ direction)
        solution = solution + alpha * direction
        before, residual = residual, residual - alpha * M @ direction
        direction = residual + residual @ residual / (before @ before) * direction
    return solution
