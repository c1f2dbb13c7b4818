"""CWU and back-matching through a transformer and a CNN with norms, against layers written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from algebra import relative
from slow_layers import EPS, Slow
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


class Transformer(nn.Module):
    """Two of torch's own blocks with norms before their branches, and the same written out."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)
        with torch.no_grad():
            for parameter in self.parameters():  # torch begins with biases of zero and copies of one block
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x))))

    def write_out(self, x: Tensor, slow: Slow) -> Tensor:
        def norm(h: Tensor, layer: nn.LayerNorm) -> Tensor:
            return slow.affine(F.layer_norm(h, (8,), eps=layer.eps), layer, -1)

        def linear(h: Tensor, layer: nn.Linear) -> Tensor:
            return slow.linear(h, layer.weight, layer.bias)

        h = slow.embedding(x, self.embedding)
        for block in self.blocks.layers:
            attention = block.self_attn
            packed = slow.linear(norm(h, block.norm1), attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in packed.chunk(3, 2))
            mixed = (q @ k.mT / math.sqrt(4)).softmax(3) @ v
            h = h + linear(mixed.transpose(1, 2).flatten(2), attention.out_proj)
            h = h + linear(torch.relu(linear(norm(h, block.norm2), block.linear1)), block.linear2)
        return linear(norm(h, self.norm), self.head)


class Convolutions(nn.Module):
    """A convolution with batch norm, one with group norm, and the same written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.norm2 = nn.GroupNorm(2, 6)
        self.head = nn.Linear(54, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.first(x)))
        h = torch.relu(self.norm2(self.second(h)))
        return self.head(h.flatten(1))

    def write_out(self, x: Tensor, slow: Slow) -> Tensor:
        z = slow.conv(x, self.first)
        # batch norm's own J⁺, in exact back-matching: its backward over (γ/σ)²
        if slow.matches:
            m = self.norm1.weight.square() / (z.detach().var((0, 2, 3), correction=0) + self.norm1.eps)
            z = Divided.apply(z, m.detach()[:, None, None])
        white = F.batch_norm(z, None, None, None, None, True, 0.0, self.norm1.eps)
        h = torch.relu(slow.affine(white, self.norm1, 1))
        z = slow.conv(h, self.second)
        h = torch.relu(slow.affine(F.group_norm(z, 2, eps=self.norm2.eps), self.norm2, 1))
        return slow.linear(h.flatten(1), self.head.weight, self.head.bias)


class Divided(torch.autograd.Function):
    """The identity, whose backward divides."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta / ctx.by, None


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "transformer":
        return Transformer(), torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    return Convolutions(), torch.randn(4, 1, 8, 8), torch.randint(5, (4,))


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, -2), y.flatten())


ALL = ["linear", "conv", "embedding", "norm"]
CASES = {
    "CWU": (pw.Consequentialism(EPS), None, {"transformer": 0.88, "convolutions": 0.96}),
    "CWU, all kinds": (pw.Consequentialism(EPS), ALL, {"transformer": 1.0, "convolutions": 1.0}),
    "exact back-matching": (
        pw.BackMatching("exact", eps=EPS, cap=None),
        None,
        {"transformer": 1.0, "convolutions": 1.0},
    ),
}


@pytest.mark.parametrize("name", ["transformer", "convolutions"])
@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_layers_written_out(case, name):
    rule, kinds, shares = CASES[case]
    model, x, y = make(name)
    rule.attach(model, kinds=kinds)
    loss_of(model(x), y).backward()
    share = rule.explain(len(x)).share
    assert share == pytest.approx(shares[name], abs=0.005)
    assert not rule.health.counts
    rule.detach()
    exact = isinstance(rule, pw.BackMatching)
    taken = ALL if exact or kinds else ["linear", "conv"]
    slow = Slow(len(x), centres=exact, matches=exact, takes=taken.__contains__)
    loss_of(model.write_out(x, slow), y).backward()
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, slow.updates[parameter]) < 1e-8, key


@pytest.mark.parametrize("name", ["transformer", "convolutions"])
def test_the_writing_out_is_the_model(name):
    """Without any solve, values and gradients are the model's."""
    model, x, y = make(name)
    slow = Slow(len(x), centres=False, matches=False, takes=lambda kind: False)
    written = model.write_out(x, slow)
    assert relative(written, model(x)) < 1e-12
    loss_of(written, y).backward()
    loss_of(model(x), y).backward()
    for key, parameter in model.named_parameters():
        assert relative(slow.updates[parameter], parameter.grad) < 1e-10, key


@pytest.mark.parametrize("name", ["transformer", "convolutions"])
def test_the_rate_divides_each_layers_gradient(name):
    """``G / (m_W E)`` and ``Δᵀ1 / (positions E)``, with the E that was measured; embeddings are plain."""
    model, x, y = make(name)
    loss_of(model(x), y).backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    seen = {}
    rule = pw.BackMatching(cap=None).attach(model)
    with rule.observing(lambda call, *_: seen.update({call.name: call})):
        loss_of(model(x), y).backward()
    assert rule.explain(len(x)).share == pytest.approx(0.94 if name == "transformer" else 1.0, abs=0.005)
    rule.detach()
    covered = set()
    for layer, call in seen.items():
        A = call.map.rows(call.a)
        m = A.square().sum((1, 2)).mean() / (len(x) * A.shape[2])
        weight = layer if layer.endswith("_weight") else f"{layer}.weight"
        bias = weight.removesuffix("weight") + "bias"
        parameters = dict(model.named_parameters())
        assert relative(parameters[weight].grad, plain[weight] / (m * call.energy)) < 1e-10, weight
        covered.add(weight)
        if bias in plain:
            positions = A.shape[1] / len(x)
            assert relative(parameters[bias].grad, plain[bias] / (positions * call.energy)) < 1e-10, bias
            covered.add(bias)
    left = set(plain) - covered
    assert left == ({"embedding.weight"} if name == "transformer" else set())
    assert all(torch.equal(dict(model.named_parameters())[key].grad, plain[key]) for key in left)
