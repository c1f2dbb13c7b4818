"""ProxProp against the equations of the paper (P1 to P18 of the method notes), in float64."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, unfold

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

F64 = torch.float64


def gradients(model: nn.Module, x: Tensor, y: Tensor, rule: pw.Rule | None = None, **attach: object) -> dict:
    """All that backward leaves: gradients by name, and that of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    if rule is not None:
        rule.attach(model, **attach)
    cross_entropy(model(x), y).backward()
    if rule is not None:
        rule.detach()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"input": x.grad}


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def make(n: int, d: int, m: int, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A layer, its input, Δ, A = [input, 1] and G = ΔᵀA."""
    torch.manual_seed(seed)
    x, delta = torch.randn(n, d), torch.randn(n, m)
    return nn.Linear(d, m), x, delta, with_ones(x), delta.T @ with_ones(x)


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4))
    return model, torch.randn(11, 7), torch.randint(4, (11,))


def local_problems(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and gradient at the output of each linear layer, by plain torch."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    loss = cross_entropy(model(x), y)
    deltas = torch.autograd.grad(loss, [out for _, out in seen.values()])
    for handle in handles:
        handle.remove()
    return {name: (a.detach(), d) for (name, (a, _)), d in zip(seen.items(), deltas, strict=True)}


SIZES = [(12, 5, 3), (5, 12, 3), (6, 5, 3), (5, 12, 30), (4, 6, 7)]


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0, 1e3])
def test_p1_p2_linear_system(n, d, m, tau):
    """``(AᵀA + I/τ) v = G``, whichever side it was solved on."""
    layer, x, delta, A, G = make(n, d, m)
    v = move_of(pw.ProxProp(tau=tau), layer, x, delta)
    M = A.T @ A + torch.eye(d + 1) / tau
    assert relative(v @ M, G) < (1e-12 if n > d + 1 else 1e-10)
    assert relative(v, torch.linalg.solve(M, G.T).T) < 1e-9


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_p3_step_is_the_proximal_minimiser(n, d, m):
    """Optimality of θ⁺ in eq. 11, and the decrease ½⟨v, G⟩ of its objective."""
    tau = 0.7
    layer, x, delta, A, G = make(n, d, m)
    theta = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    v = move_of(pw.ProxProp(tau=tau), layer, x, delta)
    target = A @ theta.T - delta  # z⁺: the explicit step on z

    def objective(t: Tensor) -> Tensor:
        return 0.5 * (A @ t.T - target).square().sum() + (t - theta).square().sum() / (2 * tau)

    new = (theta - v).requires_grad_()
    slope = torch.autograd.grad(objective(new), new)[0]
    assert slope.norm() < 1e-10 * G.norm()
    assert relative(objective(theta) - objective(new), 0.5 * (v * G).sum()) < 1e-10


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_p4_limits(n, d, m):
    """τ → 0 is backpropagation scaled by τ; τ → ∞ is least squares, or its minimum-norm solution."""
    layer, x, delta, A, G = make(n, d, m)
    largest = torch.linalg.eigvalsh(A.T @ A)[-1].item()
    for tau in (1e-3, 1e-6):
        v = move_of(pw.ProxProp(tau=tau), layer, x, delta)
        assert relative(v / tau, G) <= tau * largest
    v = move_of(pw.ProxProp(tau=1e10), layer, x, delta)
    assert relative(v.T, torch.linalg.pinv(A) @ delta) < 1e-5
    if n <= d + 1:
        assert relative(A @ v.T, delta) < 1e-5


def test_p5_descent_bounds():
    for seed in range(50):
        tau = 10 ** (seed / 10 - 2)
        layer, x, delta, A, G = make(4 + seed % 9, 6, 3, seed)
        v = move_of(pw.ProxProp(tau=tau), layer, x, delta)
        largest = torch.linalg.eigvalsh(A.T @ A)[-1]
        slope = (v * G).sum() / G.square().sum()
        assert (1 - 1e-9) / (largest + 1 / tau) <= slope <= tau * (1 + 1e-9)


@pytest.mark.parametrize("n", [30, 5])
def test_p6_conjugate_gradients(n):
    """cg1 by hand; the error in the norm of M falls with every step; exact after all; always descent."""
    layer, x, delta, A, G = make(n, 8, 3)
    M = A.T @ A + torch.eye(9) / 2
    exact = move_of(pw.ProxProp(tau=2.0), layer, x, delta)
    iterates = [move_of(pw.ProxProp(2.0, "cg", k), layer, x, delta) for k in range(1, 12)]
    first = G * (G.square().sum(1) / (G @ M * G).sum(1))[:, None]
    assert relative(iterates[0], first) < 1e-12
    energies = [((v - exact) @ M * (v - exact)).sum().item() for v in iterates]
    reachable = min(n, 9)
    assert all(b < a for a, b in pairwise(energies[:reachable]))
    assert relative(iterates[10], exact) < 1e-8
    official = [move_of(pw.ProxProp(2.0, "cg_official", k), layer, x, delta) for k in range(1, 12)]
    assert all((v * G).sum() > 0 for v in iterates + official)


def test_p6_official_iteration_is_slower_but_gets_there():
    """Its objective falls too, but never below the textbook's of as many steps."""
    layer, x, delta, A, G = make(40, 12, 3)
    M = A.T @ A + torch.eye(13) / 2

    def objective(v: Tensor) -> float:
        return (0.5 * (v @ M * v).sum() - (v * G).sum()).item()

    textbook = [objective(move_of(pw.ProxProp(2.0, "cg", k), layer, x, delta)) for k in range(1, 6)]
    official = [objective(move_of(pw.ProxProp(2.0, "cg_official", k), layer, x, delta)) for k in range(1, 6)]
    assert official[0] == pytest.approx(textbook[0], rel=1e-6)
    assert all(o > t for o, t in zip(official[1:], textbook[1:], strict=True))
    assert all(b <= a for a, b in pairwise(official))


@pytest.mark.parametrize("solver", ["exact", "cg", "cg_official"])
def test_p7_network(solver):
    """Input gradient and excluded last layer are backpropagation's; ``M_l v_l`` is its gradient elsewhere."""
    model, x, y = mlp()
    plain = gradients(model, x, y)
    ours = gradients(model, x, y, pw.ProxProp(0.3, solver), exclude="4")
    for name in ("input", "4.weight", "4.bias"):
        assert torch.equal(ours[name], plain[name])
    for name, (a, _) in local_problems(model, x, y).items():
        A = with_ones(a)
        v = torch.cat([ours[f"{name}.weight"], ours[f"{name}.bias"][:, None]], 1)
        G = torch.cat([plain[f"{name}.weight"], plain[f"{name}.bias"][:, None]], 1)
        if name != "4" and solver == "exact":
            assert relative(v @ (A.T @ A + torch.eye(A.shape[1]) / 0.3), G) < 1e-11
        elif name != "4":
            assert (v * G).sum() > 0


def test_p8_propositions_1_and_2():
    """A forward pass and one sweep over the penalty E of eq. 3, with autograd for all slopes."""
    model, x, y = mlp()
    tau, tau_theta = 0.2, 0.4
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    sigma = [torch.tanh, torch.relu]
    theta = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach().requires_grad_() for layer in linear]
    plain, ours = gradients(model, x, y), gradients(model, x, y, pw.ProxProp(tau_theta), exclude="4")

    z, a = [], [x]
    for t, s in zip(theta, sigma, strict=False):
        z.append((with_ones(a[-1]) @ t.T).detach())
        a.append(s(z[-1]).detach())
    top = a[2].requires_grad_()
    loss = cross_entropy(with_ones(top) @ theta[2].T, y)
    a_half = top.detach() - tau * torch.autograd.grad(loss, top)[0]  # (8)
    for i in (1, 0):
        z_i, a_below = z[i].requires_grad_(), a[i].detach().requires_grad_()
        penalty = 0.5 * (sigma[i](z_i) - a_half).square().sum()
        z_half = z_i.detach() - torch.autograd.grad(penalty, z_i)[0]  # (9), ρ = γ = 1/τ: steps of length one
        coupling = 0.5 * (with_ones(a_below) @ theta[i].T - z_half).square().sum()
        slope_a, slope_theta = torch.autograd.grad(coupling, [a_below, theta[i]])
        a_half = a_below.detach() - slope_a  # (10)
        name = str(2 * i)
        G = torch.cat([plain[f"{name}.weight"], plain[f"{name}.bias"][:, None]], 1)
        v = torch.cat([ours[f"{name}.weight"], ours[f"{name}.bias"][:, None]], 1)
        assert relative(slope_theta, tau * G) < 1e-10  # Prop. 1: the explicit sweep is gradient descent
        A, old = with_ones(a_below).detach(), theta[i].detach()
        root = math.sqrt(1 / tau_theta)
        stacked = torch.cat([A, root * torch.eye(A.shape[1])])
        new = torch.linalg.lstsq(stacked, torch.cat([z_half, root * old.T])).solution.T  # (11)
        assert relative(old - new, tau * v) < 1e-9  # Prop. 2


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_p10_convolution(solver):
    """By autograd on the convolution itself: ``(φ*φ + I/τ) v = G``, and the input gradient."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    model, tau = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 3 * 4, 4)), 0.3
    x, y = torch.randn(9, 4, 6, 7), torch.randint(4, (9,))
    plain = gradients(model, x, y)
    ours = gradients(model, x, y, pw.ProxProp(tau, solver, 40))
    assert relative(ours["input"], plain["input"]) < 1e-13
    v = [ours["0.weight"].requires_grad_(), ours["0.bias"].requires_grad_()]
    image = conv2d(x, *v, 2, 1, 1, 2)
    back = torch.autograd.grad(0.5 * image.square().sum(), v)
    for applied, part, name in zip(back, v, ("0.weight", "0.bias"), strict=True):
        assert relative(applied + part / tau, plain[name]) < (1e-11 if solver == "exact" else 1e-8)


def test_p11_p13_batch_size():
    """The sum: k copies of the batch act as kτ. The mean: they change nothing; ``FOOF`` with damping 1/τ."""
    layer, x, delta, A, G = make(7, 9, 3)
    once = move_of(pw.ProxProp(4 * 0.3), layer, x, delta) / 4
    copies = move_of(pw.ProxProp(0.3), layer, x.repeat(4, 1), delta.repeat(4, 1) / 4)  # a mean loss
    assert relative(copies, once) < 1e-10
    rule = pw.ProxProp(0.3, gram="mean")
    mean = move_of(rule, layer, x, delta)
    assert relative(move_of(rule, layer, x.repeat(4, 1), delta.repeat(4, 1) / 4), mean) < 1e-10
    assert relative(mean, torch.linalg.solve(A.T @ A / 7 + torch.eye(10) / 0.3, G.T).T) < 1e-10
    by_sum = torch.linalg.solve(A.T @ A / 7 + torch.eye(10) / (7 * 0.3), G.T).T / 7
    assert relative(move_of(pw.ProxProp(0.3), layer, x, delta), by_sum) < 1e-10


def test_mean_gram_of_a_convolution_counts_positions():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2, bias=False)
    x, delta = torch.randn(3, 2, 4, 5), torch.randn(3, 3, 3, 4)
    U = unfold(x, 2).mT.reshape(36, 8)
    T = delta.permute(0, 2, 3, 1).reshape(36, 3)
    expected = torch.linalg.solve(U.T @ U / 36 + torch.eye(8) / 0.3, U.T @ T).T
    assert relative(move_of(pw.ProxProp(0.3, gram="mean"), conv, x, delta), expected) < 1e-11


def test_p12_basis_equivariance():
    torch.manual_seed(0)
    x, delta = torch.randn(6, 9), torch.randn(6, 3)
    Q = torch.linalg.qr(torch.randn(9, 9)).Q
    layer = nn.Linear(9, 3, bias=False)
    for solver in ("exact", "cg"):
        rule = pw.ProxProp(0.7, solver)
        assert relative(move_of(rule, layer, x @ Q, delta), move_of(rule, layer, x, delta) @ Q) < 1e-10


@pytest.mark.parametrize("n", [20, 5])
def test_p14_p15_p16_p17(n):
    """Linear in the loss; leading dimensions are rows; the bias is a column of ones; dead units stay."""
    layer, x, delta, A, _ = make(n, 9, 3)
    for rule in (pw.ProxProp(0.3), pw.ProxProp(0.3, "cg", 4)):
        v = move_of(rule, layer, x, delta)
        assert relative(move_of(rule, layer, x, 1024 * delta), 1024 * v) < 1e-13
        folded = move_of(rule, layer, x.reshape(5, n // 5, 9), delta.reshape(5, n // 5, 3))
        assert relative(folded, v) < 1e-13
        assert relative(move_of(rule, nn.Linear(10, 3, bias=False), A, delta), v) < 1e-12
    dead = delta.clone()
    dead[:, 1] = 0
    for solver in ("exact", "cg", "cg_official"):
        v = move_of(pw.ProxProp(0.3, solver, 6), layer, x, dead)
        assert (v[1] == 0).all()
        assert (v[0] != 0).all()


def test_p18_more_outputs_than_inputs():
    """The inverse applied to A instead of Δ gives the rows of the narrow layer."""
    layer, x, delta, _, _ = make(6, 9, 40)
    wide = move_of(pw.ProxProp(0.3), layer, x, delta)
    narrow = move_of(pw.ProxProp(0.3), nn.Linear(9, 4), x, delta[:, 8:12])
    assert relative(wide[8:12], narrow) < 1e-9


def test_one_sample_is_nlms():
    """``v = δ [a, 1] / (‖[a, 1]‖² + 1/τ)``."""
    layer, x, delta, A, G = make(1, 6, 3)
    q = A.square().sum().item()
    ours = move_of(pw.ProxProp(0.3), layer, x, delta)
    assert relative(ours, G / (q + 1 / 0.3)) < 1e-12
    nlms = move_of(pw.NLMS(eps=1 / (0.3 * q), reduction="sum"), layer, x, delta)
    assert relative(ours, nlms) < 1e-12


def test_fixed_points_are_stationary_points():
    """Prop. 3: nothing moves where the gradient is zero, and training goes there."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(20, 3)
    y = x @ torch.randn(3, 1) + 0.5
    start = copy.deepcopy(model.state_dict())
    for tau in (0.1, 10.0):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rule = pw.ProxProp(tau).attach(model, optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square()).sum().backward()
            optimizer.step()
        rule.detach()
        assert (model(x) - y).norm() < 1e-8
