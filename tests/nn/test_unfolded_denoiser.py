"""UnfoldedDenoiser against dense matrices, closed forms and the problem that it unrolls, in float64."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

from plywise.data.digits import load_digits
from plywise.nn import UnfoldedDenoiser
from plywise.nn.unfolded_denoiser import LEARNING, SCHEMES, bound_squared_norms

SIZE = 6


def network(scheme: str, **settings) -> UnfoldedDenoiser:
    return UnfoldedDenoiser(scheme, **{"channels": 1, "features": 4, "depth": 3, **settings}).double()


def tied_in_depth(scheme: str, depth: int) -> UnfoldedDenoiser:
    """The same filters in every step: the solver itself."""
    denoiser = network(scheme, channels=2, depth=depth)
    with torch.no_grad():
        denoiser.operators.weight.copy_(denoiser.operators.weight[:1].clone())
    return denoiser


def images(n: int = 2, channels: int = 1) -> Tensor:
    return torch.rand(n, channels, SIZE, SIZE, dtype=torch.double) * 1.4 - 0.2


def dense(filters: Tensor, size: int = SIZE) -> Tensor:
    """``D`` as a matrix, column by column."""
    channels = filters.shape[1]
    basis = torch.eye(channels * size * size, dtype=filters.dtype).reshape(-1, channels, size, size)
    return nn.functional.conv2d(basis, filters, padding=filters.shape[-1] // 2).flatten(1).T


def objective(x: Tensor, z: Tensor, D: Tensor, sigma: float) -> Tensor:
    return 0.5 * (x - z).square().sum() + sigma**2 * (D @ x.flatten()).abs().sum()


def slow(scheme: str, denoiser: UnfoldedDenoiser, z: Tensor, sigma: float) -> Tensor:
    """One image, with matrices, as the equations are written."""
    weight = denoiser.operators.weight.detach()
    Ds = [dense(filters) for filters in weight]
    taus = [0.99 / n for n in bound_squared_norms(weight)]
    v, z = sigma**2, z.flatten()
    u = Ds[0] @ z
    if scheme in ("DDFB", "DDiFB"):
        y, t = u, 1.0
        for D, tau in zip(Ds, taus, strict=True):
            if scheme == "DDFB":
                u = (u + 1.99 / 0.99 * tau * D @ (z - D.T @ u).clamp(0, 1)).clamp(-v, v)
            else:
                new = (y + tau * D @ (z - D.T @ y).clamp(0, 1)).clamp(-v, v)
                after = (1 + math.sqrt(1 + 4 * t**2)) / 2
                y, u, t = new + (t - 1) / after * (new - u), new, after
        return (z - Ds[-1].T @ u).clamp(0, 1)
    x = before = z
    for D, tau, mu in zip(Ds, taus, denoiser.scheme.log_mu.detach().exp(), strict=True):
        alpha = 1 / (1 + 2 * mu).sqrt() if scheme == "DScCP" else 1.0
        u = (u + tau / mu * D @ ((1 + alpha) * x - alpha * before)).clamp(-v, v)
        x, before = (mu / (mu + 1) * z + x / (mu + 1) - mu / (mu + 1) * D.T @ u).clamp(0, 1), x
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
def test_definition(scheme):
    """With other filters and rates in each step; more channels than one."""
    denoiser = network(scheme, channels=2)
    if hasattr(denoiser.scheme, "log_mu"):
        nn.init.normal_(denoiser.scheme.log_mu)
    z = images(3, 2)
    expected = torch.stack([slow(scheme, denoiser, image, 0.4) for image in z]).reshape(z.shape)
    assert (expected - z.clamp(0, 1)).abs().max() > 0.1
    torch.testing.assert_close(denoiser(z, 0.4), expected, rtol=0, atol=1e-12)


def test_all_schemes_solve_the_problem():
    """Run long with equal filters, they reach one objective, and nothing nearby is below it."""
    z, sigma, found = images(1, 2), 0.3, []
    for scheme in SCHEMES:
        torch.manual_seed(1)
        denoiser = tied_in_depth(scheme, 1500)
        D = dense(denoiser.operators.weight[0].detach())
        found.append(denoiser(z, sigma).detach())
        assert objective(found[-1], z, D, sigma) < 0.99 * objective(z.clamp(0, 1), z, D, sigma)
    values = [objective(x, z, D, sigma).item() for x in found]
    assert max(values) - min(values) < 1e-6 * values[0]
    for _ in range(100):
        for scale in (1e-3, 1e-1):
            near = (found[0] + scale * torch.randn_like(z)).clamp(0, 1)
            assert objective(near, z, D, sigma) >= values[0] - 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_soft_threshold(scheme):
    """One filter of one pixel: each pixel is a problem of its own, solved by a formula."""
    denoiser = network(scheme, features=1, depth=300, kernel_size=1)
    nn.init.ones_(denoiser.operators.weight)
    z = images()
    torch.testing.assert_close(denoiser(z, 0.5), (z - 0.25).clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("learning", LEARNING)
def test_without_noise_only_the_range_is_mended(scheme, learning):
    z = images()
    assert torch.equal(network(scheme, learning=learning)(z, 0.0), z.clamp(0, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_filters_of_zero(scheme):
    """Their norm is 0: no step may become infinite, forward or backward."""
    denoiser, z = network(scheme), images().requires_grad_()
    nn.init.zeros_(denoiser.operators.weight)
    out = denoiser(z, 0.3)
    assert torch.equal(out, z.clamp(0, 1))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())
    denoiser.operators.weight.data[1] = torch.randn(4, 1, 3, 3)  # one step of several
    assert denoiser(z, 0.3).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_solved_problem_is_nonexpansive(scheme):
    denoiser = tied_in_depth(scheme, 400)
    z = images(10, 2)
    moved = z + torch.randn_like(z) * 0.2
    with torch.no_grad():
        apart = (denoiser(z, 0.3) - denoiser(moved, 0.3)).flatten(1).norm(dim=1)
    assert (apart <= (z - moved).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_norms_are_bounds_for_any_image_and_tight_for_large_ones(size, channels):
    weight = torch.randn(2, 5, channels, size, size, dtype=torch.double)
    bounds = bound_squared_norms(weight)
    for filters, bound in zip(weight, bounds, strict=True):
        for image, at_least in ((2, 0.0), (16, 0.75)):
            true = torch.linalg.matrix_norm(dense(filters, image), 2) ** 2
            assert at_least * bound <= true <= bound * (1 + 1e-12)


@pytest.mark.parametrize("frequency", [0.0, 5.4, 6.5, 7.6])
def test_norms_hold_between_the_points_of_their_grid(frequency):
    """A filter whose symbol is largest at a frequency of our choice."""
    where = torch.arange(3, dtype=torch.double) * 2 * math.pi * frequency / 24
    weight = torch.stack([where.cos(), where.sin()])
    weight = torch.einsum("fi,gj->fgij", weight, weight).reshape(1, 4, 1, 3, 3)
    fine = torch.fft.fft2(weight, s=(1024, 1024)).abs().square().sum((1, 2)).amax()
    assert fine <= bound_squared_norms(weight).item() <= 1.075 * fine


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_a_function_of_weights_and_input(scheme):
    """No noise of its own, nothing kept that goes stale, even if weights change behind autograd's back."""
    denoiser, z = network(scheme), images()
    stream = torch.get_rng_state()
    before = denoiser(z, 0.3)
    assert torch.equal(denoiser(z, 0.3), before)
    assert torch.equal(torch.get_rng_state(), stream)
    denoiser.operators.weight.data.mul_(3)
    other = network(scheme)
    other.load_state_dict(denoiser.state_dict())
    assert torch.equal(denoiser(z, 0.3), other(z, 0.3))
    assert not torch.equal(denoiser(z, 0.3), before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("learning", LEARNING)
def test_forward_writes_no_parameter_and_trains_all(scheme, learning):
    denoiser = network(scheme, learning=learning)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    denoiser.train()(images(), 0.4).square().sum().backward()
    for name, p in denoiser.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.grad.norm() > 0, name
        per_step = p.grad.flatten(1) if p.dim() > 1 else p.grad.unsqueeze(1)
        assert (per_step.norm(dim=1) > 0).all(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme):
    """Those of the steps' sizes by the filters included."""
    denoiser = network(scheme, features=2, depth=2)
    z = images(1)[..., :4, :4].requires_grad_()
    names = [name for name, _ in denoiser.named_parameters()]

    def run(z: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(denoiser, dict(zip(names, values, strict=True)), (z, 0.5))

    assert torch.autograd.gradcheck(run, (z, *denoiser.parameters()))


def test_numbers_of_weights():
    """Those of the authors' pretrained network, and of LFO twice the filters."""
    assert sum(p.numel() for p in UnfoldedDenoiser().parameters()) == 34_580
    assert sum(p.numel() for p in UnfoldedDenoiser("DDFB", learning="LFO").parameters()) == 2 * 34_560


def test_free_operators_begin_normalised_and_come_apart():
    denoiser = network("DDFB", learning="LFO")
    weight, back = denoiser.operators.weight, denoiser.operators.weight_back
    assert torch.equal(weight, back)
    torch.testing.assert_close(bound_squared_norms(weight), torch.ones(3).double(), rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(denoiser.parameters(), 0.1)
    denoiser(images(), 0.4).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(weight, back)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_noise_level_for_each_image(scheme):
    denoiser, z = network(scheme), images(3)
    sigmas = torch.tensor([0.0, 0.2, 0.5], dtype=torch.double)
    one_by_one = torch.cat([denoiser(image[None], s.item()) for image, s in zip(z, sigmas, strict=True)])
    torch.testing.assert_close(denoiser(z, sigmas), one_by_one, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict(scheme):
    denoiser = network(scheme, learning="LFO")
    file = io.BytesIO()
    torch.save(denoiser.state_dict(), file)
    file.seek(0)
    other = network(scheme, learning="LFO")
    other.load_state_dict(torch.load(file, weights_only=True))
    z = images()
    assert torch.equal(denoiser(z, 0.3), other(z, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    denoiser, z = network("DScCP"), images()
    expected = denoiser(z, 0.3)
    got = denoiser.to(dtype)(z.to(dtype), 0.3)
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "FISTA"}, "scheme must be one of 'DDFB'.*'FISTA'"),
        ({"learning": "free"}, "learning must be one of 'LNO', 'LFO'"),
        ({"kernel_size": 4}, "kernel_size must be odd, not 4"),
        ({"depth": 0}, "depth must be a whole number above 0, not 0"),
        ({"features": 2.5}, "features must be a whole number above 0"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        UnfoldedDenoiser(**settings)


@pytest.mark.parametrize("sigma", [-0.1, math.nan, torch.ones(3), torch.ones(2, 1)])
def test_wrong_noise(sigma):
    with pytest.raises(ValueError, match="sigma must be a number of at least 0, or one for each of the 2"):
        network("DDFB")(images(), sigma)


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 3, 6, 6)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=r"images must be of \(N, 1, H, W\)"):
        network("DDFB")(torch.rand(shape).double(), 0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_takes_noise_away(scheme):
    """Digits that were not trained on come out nearer to what they were, and nearer than by no denoiser."""
    train, _, test = load_digits()
    denoiser = UnfoldedDenoiser(scheme, channels=1, features=8, depth=4)
    optimizer = torch.optim.Adam(denoiser.parameters(), 0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        clean = train.x[torch.randint(1100, (32,), generator=generator)].reshape(-1, 1, 8, 8)
        noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
        loss = nn.functional.mse_loss(denoiser(noisy, 0.2), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean = test.x.reshape(-1, 1, 8, 8)
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
    error = nn.functional.mse_loss(denoiser(noisy, 0.2), clean)
    assert error < 0.8 * nn.functional.mse_loss(noisy.clamp(0, 1), clean)
