"""Exact updates where float32 loses digits or leaves its range, against definitions in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise import NLMS, Consequentialism, ProxProp, Rule


def compute_update(rule: Rule, model: nn.Module, x: Tensor, delta: Tensor, **options: str) -> Tensor:
    """The update of all parameters as one vector, in float64."""
    rule.attach(model, **options)
    model(x).backward(delta)
    rule.detach()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def measure_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 1))
        self.bias = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


@pytest.mark.parametrize("size", [1e15, 3e18, 1e20, 1e30])
@pytest.mark.parametrize("rule", [ProxProp(), Consequentialism(eps=0.5)])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv", "experts"])
def test_constant_inputs_of_any_size(kind, rule, size):
    model, shape = {
        "linear": (nn.Linear(1, 5), (40, 1)),
        "conv": (nn.Conv2d(1, 2, 1), (3, 1, 6, 6)),
        "grouped conv": (nn.Conv2d(2, 2, 1, groups=2), (3, 2, 6, 6)),
        "experts": (Experts(), (2, 5, 1)),
    }[kind]
    torch.manual_seed(1)
    x = torch.full(shape, size)
    delta = torch.randn(model(x).shape)
    wide = delta.double()
    axes = [axis for axis in range(wide.dim()) if axis != (0 if kind == "experts" else 1)]
    sums = wide.sum(axes)
    rows, c = delta.numel() // len(sums), float(x.flatten()[0])
    energy = rows * (c * c + 1)
    is_proximal = isinstance(rule, ProxProp)
    damping = 1.0 if is_proximal else rule.eps * energy / min(rows, 2)
    samples = 1 if is_proximal else {"experts": 5, "linear": 40}.get(kind, 3)
    bias = samples * sums / (energy + damping)
    assert measure_error(compute_update(rule, model, x, delta), torch.cat([bias * c, bias])) < 1e-4


def test_constant_inputs_of_a_convolution_in_float64():
    torch.manual_seed(1)
    x, delta = torch.full((8, 1, 5), 1e15 / 3, dtype=torch.float64), torch.randn(8, 1, 5).double()
    c = float(x[0, 0, 0])
    bias = delta.sum() / (40 * (c * c + 1) + 0.01)
    found = compute_update(ProxProp(tau=100.0), nn.Conv1d(1, 1, 1).double(), x, delta)
    assert measure_error(found, torch.stack([bias * c, bias])) < 1e-4


def test_two_rows_with_a_large_offset():
    x = torch.tensor([[10000.2793], [10000.6953]])
    delta = torch.tensor([[-0.9948], [0.6959]])
    (a, b), (d, e) = (map(Fraction, t.flatten().tolist()) for t in (x, delta))
    # [[a² + b² + 1, a + b], [a + b, 3]] of tau = 1
    p, q, r, right, total = a * a + b * b + 1, a + b, Fraction(3), d * a + e * b, d + e
    determinant = p * r - q * q
    wanted = torch.tensor(
        [float((right * r - q * total) / determinant), float((p * total - q * right) / determinant)]
    ).double()
    found = compute_update(ProxProp(), nn.Linear(1, 1), x, delta)
    assert measure_error(found, wanted) < 1e-5


def test_one_column_with_an_offset_beside_columns_with_large_variance():
    # with padding, only one place of the kernel always reads a pixel
    torch.manual_seed(1)
    model = nn.Conv2d(1, 1, 2, stride=2, padding=1)
    x = 10000 + torch.randn(5, 1, 5, 5)
    delta = torch.randn(model(x).shape)
    rows = F.unfold(x.double(), 2, padding=1, stride=2).mT.reshape(-1, 4)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    wanted = v.mT @ (s / (s * s + 1e-6) * (u.mT @ delta.double().flatten()))
    assert measure_error(compute_update(ProxProp(tau=1e6), model, x, delta), wanted) < 1e-4


def test_nlms_on_an_embedding_that_sees_padding_alone():
    model = nn.Embedding(4, 3, padding_idx=0)
    update = compute_update(
        NLMS(), model, torch.zeros(5, dtype=torch.long), torch.ones(5, 3), kinds="embedding"
    )
    assert not update.any()
