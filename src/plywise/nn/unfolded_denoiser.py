"""UnfoldedDenoiser: an image denoiser whose layers are the steps of a convex solver."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from plywise._util.checks import require_choice, require_whole


class DenoiserLayer(NamedTuple):
    """The operators of one step: filters ``D_k`` (F, C, k, k), the transposed filters, and the step size."""

    down: Tensor
    up: Tensor
    step: Tensor

    def analyse(self, x: Tensor) -> Tensor:
        """Compute ``D_k x``, from images (N, C, H, W) to features (N, F, H, W)."""
        return conv2d(x, self.down, padding=self.down.shape[-1] // 2)

    def synthesise(self, u: Tensor) -> Tensor:
        """Compute ``D_kᵀ u``, from features back to images."""
        return conv_transpose2d(u, self.up, padding=self.up.shape[-1] // 2)


def bound_squared_norms(weight: Tensor) -> Tensor:
    """Bound ``‖D_k‖²`` from above for images of any size: filters (K, F, C, k, k) to (K,).

    The norm of a convolution on the plane is the largest singular value of its symbol over all frequencies;
    with zero padding of a finite image it is not larger. The squared symbol is a trigonometric polynomial of
    degree k - 1, so between the points of a grid it exceeds them by a known factor at most, which is included
    (7 % for k = 3). The bound needs no random numbers and no iteration, and its gradient is exact.
    """
    size = weight.shape[-1]
    grid = 8 * size
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))  # torch has no transform of bfloat16
    symbol = torch.fft.rfft2(exact, s=(grid, grid)).movedim((1, 2), (-2, -1))
    largest = torch.linalg.eigvalsh(symbol.mH @ symbol)[..., -1].flatten(1).amax(1)
    return (largest / math.cos(math.pi * (size - 1) / grid) ** 2).to(weight.dtype)


class NormalisedOperators(nn.Module):
    """LNO: the operator back to images is the transpose of ``D_k``, and the step size is ``1/‖D_k‖²``."""

    def __init__(self, depth: int, features: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, features, channels, kernel_size, kernel_size))
        for filters in self.weight:
            nn.init.kaiming_normal_(filters, nonlinearity="relu")

    def make_layers(self) -> list[DenoiserLayer]:
        """Make the operators of all steps."""
        norms = bound_squared_norms(self.weight)
        zero = norms == 0  # filters of zeros need no step
        steps = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norms))
        return [DenoiserLayer(*layer) for layer in zip(self.weight, self.weight, steps, strict=True)]


class FreeOperators(NormalisedOperators):
    """LFO: learned filters back to images, and steps of 1; both kinds begin as ``D_k/‖D_k‖``."""

    def __init__(self, depth: int, features: int, channels: int, kernel_size: int) -> None:
        super().__init__(depth, features, channels, kernel_size)
        with torch.no_grad():
            self.weight.div_(bound_squared_norms(self.weight).sqrt().reshape(-1, 1, 1, 1, 1))
        self.weight_back = nn.Parameter(self.weight.detach().clone())

    def make_layers(self) -> list[DenoiserLayer]:
        """Make the operators of all steps."""
        ones = self.weight.new_ones(len(self.weight))
        return [DenoiserLayer(*layer) for layer in zip(self.weight, self.weight_back, ones, strict=True)]


class DDFB(nn.Module):
    """Dual forward-backward: a gradient step on the dual problem, then a projection."""

    def __init__(self, depth: int) -> None:
        super().__init__()

    def forward(self, z: Tensor, bound: Tensor, layers: Sequence[DenoiserLayer]) -> Tensor:
        """Denoise ``z``; the dual variables stay within ± ``bound``."""
        u = layers[0].analyse(z)
        for layer in layers:
            u = _clip(u + 1.99 * layer.step * layer.analyse(_compute_image(layer, z, u)), bound)
        return _compute_image(layers[-1], z, u)


class DDiFB(DDFB):
    """Dual forward-backward with inertia: steps start from FISTA's extrapolation of ``u``."""

    def forward(self, z: Tensor, bound: Tensor, layers: Sequence[DenoiserLayer]) -> Tensor:
        """Denoise ``z``; the dual variables stay within ± ``bound``."""
        u = ahead = layers[0].analyse(z)
        t = 1.0
        for layer in layers:
            before = u
            u = _clip(ahead + 0.99 * layer.step * layer.analyse(_compute_image(layer, z, ahead)), bound)
            t, t_before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            ahead = u + (t_before - 1) / t * (u - before)
        return _compute_image(layers[-1], z, u)


class DCP(nn.Module):
    """Chambolle-Pock: alternating primal and dual steps; the primal rate μ of each step is learned."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.log_mu = nn.Parameter(torch.zeros(depth))  # a rate stays above 0, whatever the optimizer does

    def compute_inertia(self, mu: Tensor) -> Tensor:
        """Compute α, how far the dual step extrapolates."""
        return torch.ones_like(mu)

    def forward(self, z: Tensor, bound: Tensor, layers: Sequence[DenoiserLayer]) -> Tensor:
        """Denoise ``z``; the dual variables stay within ± ``bound``."""
        mu = self.log_mu.exp()
        x = before = z
        u = layers[0].analyse(z)
        for layer, rate, alpha, pull in zip(layers, mu, self.compute_inertia(mu), mu / (1 + mu), strict=True):
            ahead = x + alpha * (x - before)
            u = _clip(u + 0.99 * layer.step / rate * layer.analyse(ahead), bound)
            before, x = x, (x + pull * (z - x - layer.synthesise(u))).clamp(0, 1)
        return x


class DScCP(DCP):
    """Chambolle-Pock for a strongly convex problem: α follows from μ."""

    def compute_inertia(self, mu: Tensor) -> Tensor:
        """Compute ``1/√(1 + 2μ)``."""
        return (1 + 2 * mu).rsqrt()


def _clip(u: Tensor, bound: Tensor) -> Tensor:
    """Apply the proximal map of the conjugate of ``bound · ‖·‖₁``."""
    return torch.clamp(u, -bound, bound)


def _compute_image(layer: DenoiserLayer, z: Tensor, u: Tensor) -> Tensor:
    """Compute the image that belongs to dual variables."""
    return (z - layer.synthesise(u)).clamp(0, 1)


SCHEMES: dict[str, type[DDFB] | type[DCP]] = {"DDFB": DDFB, "DDiFB": DDiFB, "DCP": DCP, "DScCP": DScCP}
LEARNING: dict[str, type[NormalisedOperators]] = {"LNO": NormalisedOperators, "LFO": FreeOperators}


class UnfoldedDenoiser(nn.Module):
    """A denoiser that unrolls a solver of ``½‖x - z‖² + σ²‖Dx‖₁, 0 ≤ x ≤ 1`` and learns its filters D.

    Idea: run K steps of a convex solver, give each step filters of its own, and learn them from pairs of
        clean and noisy images. What comes out is small, takes the noise level as an input, and with equal
        filters in all steps is a proximal map, which no input can make expansive.
    Equation: "DDFB": u ← clip(u + τ D_k P(z - D_kᵀu), ±σ²), then x = P(z - D_Kᵀu). "DDiFB": the same from
        u + α_k (u - u_before) with FISTA's α_k. "DCP": u ← clip(u + τ/μ_k D_k(x + α(x - x_before)), ±σ²),
        x ← P(x + μ_k/(1 + μ_k) (z - x - D_kᵀu)) with α = 1; "DScCP": α = 1/√(1 + 2μ_k). P clamps to
        [0, 1]; τ = 1.99/‖D_k‖² in DDFB, 0.99/‖D_k‖² in the others; u begins as D_0 z.
    Use when: noise is Gaussian of a known level, weights must be few, or a denoiser sits inside another
        iteration and must not blow up there.
    Do not use when: only the best figure counts: deep denoisers with hundreds of times the weights have it.
    Layers: a model of its own: images (N, C, H, W) in [0, 1] and their noise level in, images out.
    Cost: K (K + 1 in the dual schemes) convolutions C → F of k×k and as many back; FKC Fourier transforms of
        (8k)² points and K(8k)²/2 eigenvalue problems of C×C for the norms, whatever the batch.
    Status: variant. The problem and DScCP are as in the authors' code; the steps of DDFB, DDiFB and DCP are
        derived from the problem. The code's norms come from a power iteration with fresh noise in each
        forward, so that outputs vary; ours are a bound by Fourier transform, and their gradient counts.
        Learned are log μ_k, not μ_k. What LFO begins with is ours.
    Source: Le, Repetti, Pustelnik, "Unfolded proximal neural networks for robust image Gaussian denoising",
        IEEE Transactions on Image Processing, 2024 (arXiv 2308.03139).
    Code: deepinv/deepinv (DScCP), HoangTrieuVy/Deep-Unfolding-Networks-for-Image-Denoising (predecessor).
    Results: the paper's are not reproduced here: its images (BSDS500 and others) are not at hand. Ours on
        CIFAR-10 are in benchmarks/denoising.json, made by ``python benchmarks/denoising.py``.
    Limits: filters of an odd size, zeros around the image. Noise of an unknown level must be estimated
        first. NaNs in the filters are an error of torch.linalg.

    Args:
        scheme: the solver, "DDFB", "DDiFB", "DCP" or "DScCP". Default "DScCP".
        channels: C, of the images. Default 3. Range 1 to 4.
        features: F, filters in each step. Default 64. Range 8 to 64.
        depth: K, steps. Default 20. Range 5 to 40.
        kernel_size: k, of the filters, odd. Default 3. Range 3 to 7.
        learning: "LNO" ties the way back to the way there and normalises the steps; "LFO" learns both, with
            steps of 1 and twice the filters. Default "LNO".

    Raises:
        ValueError: an argument is out of range, images are not of (N, C, H, W), or a noise level is below 0.

    Example:
        >>> import torch
        >>> from plywise.nn import UnfoldedDenoiser
        >>> denoiser = UnfoldedDenoiser("DDiFB", channels=1, features=8, depth=5)
        >>> noisy = (torch.full((2, 1, 16, 16), 0.5) + 0.1 * torch.randn(2, 1, 16, 16))
        >>> denoiser(noisy, 0.1).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        scheme: str = "DScCP",
        *,
        channels: int = 3,
        features: int = 64,
        depth: int = 20,
        kernel_size: int = 3,
        learning: str = "LNO",
    ) -> None:
        super().__init__()
        require_choice(self, "scheme", scheme, tuple(SCHEMES))
        require_choice(self, "learning", learning, tuple(LEARNING))
        require_whole(self, channels=channels, features=features, depth=depth, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"UnfoldedDenoiser: kernel_size must be odd, not {kernel_size!r}.")
        self.channels = channels
        self.operators = LEARNING[learning](depth, features, channels, kernel_size)
        self.scheme = SCHEMES[scheme](depth)

    def forward(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """Denoise images.

        Args:
            noisy: images (N, C, H, W), clean ones in [0, 1].
            sigma: the noise's standard deviation, one number or one for each image (N,).
        """
        if noisy.dim() != 4 or noisy.shape[1] != self.channels:
            raise ValueError(
                f"UnfoldedDenoiser: images must be of (N, {self.channels}, H, W), not {tuple(noisy.shape)}."
            )
        level = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device)
        if level.shape not in ((), (len(noisy),)) or not bool((level >= 0).all()):
            raise ValueError(
                "UnfoldedDenoiser: sigma must be a number of at least 0, or one for each of the "
                f"{len(noisy)} images, not {sigma!r}."
            )
        return self.scheme(noisy, level.square().reshape(-1, 1, 1, 1), self.operators.make_layers())
