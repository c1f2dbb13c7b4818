"""Norms of large tensors are those of float64, whatever the layout."""

import pytest
import torch
from torch import Tensor, nn

import plywise as pw
from plywise.numerics.norms import LONGEST, compute_norm, compute_norms, compute_row_norms


def draw(kind: str, *shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.full(shape, 0.1) if kind == "equal" else torch.randn(shape)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT,
    "channels last": lambda x: x.view(-1, 8, 5, 5).to(memory_format=torch.channels_last),
    "every second column": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(500, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["equal", "normal"])
def test_a_norm_is_exact_to_rounding(kind: str, layout: str) -> None:
    x = LAYOUTS[layout](draw(kind, 1000, 3000))
    assert x.numel() > LONGEST
    assert float(compute_norm(x)) == pytest.approx(float(x.double().norm()), rel=1e-5)


@pytest.mark.parametrize("size", [0, 1, LONGEST - 1, LONGEST, LONGEST + 1, LONGEST + 512, 3 * LONGEST + 7])
def test_all_numbers_count(size: int) -> None:
    rows = draw("normal", 3, size)
    assert torch.allclose(compute_row_norms(rows).double(), rows.double().norm(dim=1), rtol=1e-6)
    assert float(compute_norm(rows[0])) == pytest.approx(float(rows[0].double().norm()), rel=1e-6)


def test_half_precision_is_added_up_in_the_wanted_dtype() -> None:
    tensors = [draw("equal", 5), draw("equal", 2000, 3000)]
    norms = compute_norms([tensor.bfloat16() for tensor in tensors], torch.float32)
    for norm, tensor in zip(norms, tensors, strict=True):
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(float(tensor.bfloat16().double().norm()), rel=1e-5)


@pytest.mark.parametrize("rule", [pw.Consequentialism(), pw.BackMatching(), pw.BackMatching(mode="exact")])
def test_a_damping_relative_to_many_equal_inputs_is_right(rule: pw.Rule) -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 500) * (torch.rand(3000, 500) < 0.05) + 30
    delta, layer = torch.randn(3000, 10) / 3000, nn.Linear(500, 10)
    moves = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype).zero_grad()
        rule.attach(layer, torch.optim.SGD(layer.parameters(), 0.1))
        layer(x.to(dtype)).backward(delta.to(dtype))
        moves.append(layer.weight.grad.double())
        rule.detach()
    assert torch.linalg.vector_norm(moves[0] - moves[1]) < 1e-4 * torch.linalg.vector_norm(moves[1])
