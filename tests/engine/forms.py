"""Modules that use a weight in every form that the engine reads, each on a small input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

W = nn.Parameter


class Calls(nn.Module):
    """A module with a weight (and a bias) whose forward is a function of them and the input."""

    def __init__(
        self, shape: tuple[int, ...], bias: tuple[int, ...] | None, call: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.w = W(torch.randn(shape))
        self.b = None if bias is None else W(torch.randn(bias))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.b)


@dataclass(frozen=True)
class Form:
    """One way to use a weight.

    Attributes:
        name: test id.
        make: makes the module.
        shape: shape of its input; indices below 5 if ``indices``.
        indices: whether the input holds indices.
        handled: share of the parameters that must be handled with all kinds.
        bits: whether the gradient at the input must be autograd's to the bit.
        only_float32: torch has this form in no wider type.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: bool = False
    handled: float = 1.0
    bits: bool = True
    only_float32: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make()

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(2)
        if self.only_float32:
            dtype = torch.float32
        if self.indices:
            return torch.randint(0, 5, self.shape)
        return torch.randn(self.shape, dtype=torch.float64).to(dtype).requires_grad_()


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = W(torch.randn(9, 4)), W(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.w.chunk(3), self.b.chunk(3), strict=True)
        return sum(F.linear(x * (i + 1), w, b).sin() for i, (w, b) in enumerate(parts))


class TiedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.enc(x)), self.enc.weight.t())


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x)


grouped_mm = getattr(F, "grouped_mm", torch._grouped_mm)  # the public name is of torch 2.10


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = W(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, 2, 7], dtype=torch.int32)
        return grouped_mm(x, self.w, offs=ends)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.sin())


class HandNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = W(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attend(nn.Module):
    def __init__(self, how: str, **options: object) -> None:
        super().__init__()
        self.how, self.attention = how, nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = {"self": x, "pair": x.flip(1)}.get(self.how, x.roll(1, 1))
        z = y if self.how != "three" else x.sin()
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, -1] = True
        return self.attention(x, y, z, key_padding_mask=mask)[0]


def calls(
    shape: tuple[int, ...], bias: tuple[int, ...] | None, call: Callable[..., Tensor]
) -> Callable[[], nn.Module]:
    return lambda: Calls(shape, bias, call)


FORMS = [
    Form("linear", lambda: nn.Linear(4, 3), (6, 4)),
    Form("linear few rows", lambda: nn.Linear(8, 3), (3, 8)),
    Form("linear one row", lambda: nn.Linear(4, 3), (4,)),
    Form("linear 3d", lambda: nn.Linear(4, 3), (2, 5, 4)),
    Form("linear 3d no bias", lambda: nn.Linear(4, 3, bias=False), (2, 5, 4)),
    Form(
        "functional linear, keywords",
        calls((3, 4), (3,), lambda x, w, b: F.linear(x, bias=b, weight=w)),
        (6, 4),
    ),
    Form("x @ w", calls((4, 3), None, lambda x, w, b: x @ w), (6, 4)),
    Form("x @ w.T", calls((3, 4), None, lambda x, w, b: x @ w.T), (6, 4)),
    Form("3d x @ w", calls((4, 3), None, lambda x, w, b: x @ w), (2, 5, 4)),
    Form("w @ x", calls((3, 4), None, lambda x, w, b: w @ x), (4, 6)),
    Form("w @ 3d x", calls((3, 4), None, lambda x, w, b: w @ x), (2, 4, 5)),
    Form("torch.mm", calls((4, 3), None, lambda x, w, b: torch.mm(x, w)), (6, 4)),
    Form("torch.matmul", calls((4, 3), None, lambda x, w, b: torch.matmul(x, w)), (6, 4)),
    Form("addmm", calls((4, 3), (3,), lambda x, w, b: torch.addmm(b, x, w)), (6, 4)),
    Form("slice", calls((6, 4), None, lambda x, w, b: F.linear(x, w[1:4])), (6, 4)),
    Form("chunks", Chunked, (6, 4)),
    Form("tied by hand", TiedByHand, (6, 4)),
    Form("bmm", calls((2, 4, 3), None, lambda x, w, b: torch.bmm(x, w)), (2, 5, 4)),
    Form("bmm of transposed", calls((2, 3, 4), None, lambda x, w, b: x.bmm(w.mT)), (2, 5, 4)),
    Form("baddbmm", calls((2, 4, 3), (2, 1, 3), lambda x, w, b: torch.baddbmm(b, x, w)), (2, 5, 4)),
    Form("grouped_mm", Grouped, (7, 4), only_float32=True),
    Form("einsum", calls((4, 3), None, lambda x, w, b: torch.einsum("bi,io->bo", x, w)), (6, 4)),
    Form("einsum 3d", calls((3, 4), None, lambda x, w, b: torch.einsum("oi,bti->bto", w, x)), (2, 5, 4)),
    Form(
        "einsum heads", calls((4, 2, 3), None, lambda x, w, b: torch.einsum("bti,ihd->bhtd", x, w)), (2, 5, 4)
    ),
    Form(
        "einsum from heads",
        calls((2, 3, 4), None, lambda x, w, b: torch.einsum("bthd,hdo->bto", x, w)),
        (2, 5, 2, 3),
    ),
    Form(
        "einsum experts",
        calls((2, 4, 3), None, lambda x, w, b: torch.einsum("ebi,eio->beo", x, w)),
        (2, 5, 4),
    ),
    Form("conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)),
    Form("conv2d", lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), (3, 2, 7, 7)),
    Form("conv2d same, even kernel", lambda: nn.Conv2d(2, 3, 2, padding="same"), (3, 2, 5, 5), bits=False),
    Form("conv2d circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 5, 5)),
    Form("conv2d without a batch", lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    Form("conv3d", lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
    Form("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (4, 2, 5)),
    Form(
        "conv_transpose2d", lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2), (3, 2, 4, 4)
    ),
    Form("conv_transpose2d dilated", lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2), (3, 2, 4, 4)),
    Form("conv_transpose3d", lambda: nn.ConvTranspose3d(1, 2, 2, stride=2), (2, 1, 2, 2, 2)),
    Form("embedding", lambda: nn.Embedding(5, 3), (4, 3), indices=True),
    Form("embedding with padding", lambda: nn.Embedding(5, 3, padding_idx=2), (4, 3), indices=True),
    Form("embedding bag, mean", lambda: Bag("mean"), (4, 3), indices=True),
    Form("embedding bag, sum", lambda: Bag("sum"), (4, 3), indices=True),
    Form("bilinear", TwoInputs, (6, 4)),
    Form("layer norm", lambda: nn.LayerNorm(4), (6, 4)),
    Form("layer norm of two axes", lambda: nn.LayerNorm((3, 4)), (6, 3, 4)),
    Form("rms norm", lambda: nn.RMSNorm(4), (6, 4)),
    Form("rms norm by hand", HandNorm, (6, 4)),
    Form("group norm", lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    Form("batch norm", lambda: nn.BatchNorm1d(4), (6, 4)),
    Form("batch norm 2d", lambda: nn.BatchNorm2d(4), (3, 4, 3, 3)),
    Form("batch norm, eval", lambda: nn.BatchNorm1d(4).eval(), (6, 4)),
    Form("instance norm", lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 6)),
    Form("weight norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (6, 4)),
    Form("attention", lambda: Attend("self"), (3, 5, 4)),
    Form("attention to another", lambda: Attend("pair"), (3, 5, 4)),
    Form("attention of three", lambda: Attend("three"), (3, 5, 4)),
    Form("attention, other widths", lambda: Attend("three", kdim=4, vdim=4, bias=False), (3, 5, 4)),
    Form("attention with more keys", lambda: Attend("self", add_bias_kv=True), (3, 5, 4), handled=0.9),
]
"""Every form."""
