"""Families that use their weights in another way than by calling a layer of torch on its input."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from coverage_families.family import CLASSES, VOCABULARY, Family
from coverage_families.standard import classify, predict_tokens


def make_weights(*shape: int) -> nn.Parameter:
    """Draw a weight whose last but one size is the number of inputs."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-2]))


def make_weight_norm() -> nn.Module:
    weight_norm = parametrizations.weight_norm
    return nn.Sequential(
        weight_norm(nn.Linear(32, 64)),
        nn.ReLU(),
        weight_norm(nn.Linear(64, 64)),
        nn.ReLU(),
        weight_norm(nn.Linear(64, CLASSES)),
    )


def make_spectral_norm() -> nn.Module:
    spectral_norm = parametrizations.spectral_norm
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 16, 3, 2, 1)),
        nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(16, 32, 3, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        spectral_norm(nn.Linear(512, CLASSES)),
    )


def make_orthogonal() -> nn.Module:
    orthogonal = parametrizations.orthogonal
    return nn.Sequential(
        nn.Linear(32, 48), nn.Tanh(), orthogonal(nn.Linear(48, 48)), nn.Tanh(), nn.Linear(48, CLASSES)
    )


def make_pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    for index in (0, 2):
        prune.l1_unstructured(model[index], "weight", amount=0.5)
    return model


class TiedAutoencoder(nn.Module):
    """A decoder that uses the encoder's weights, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(64, 48), nn.Linear(48, 16)
        self.inner_bias, self.outer_bias = nn.Parameter(torch.zeros(48)), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.inner(F.relu(self.outer(x))))
        hidden = F.relu(F.linear(code, self.inner.weight.t(), self.inner_bias))
        return F.linear(hidden, self.outer.weight.t(), self.outer_bias)


def reconstruct(model: nn.Module) -> Tensor:
    x = torch.rand(8, 64)
    return F.mse_loss(model(x), x)


class HandWritten(nn.Module):
    """An MLP of bare parameters, inputs times outputs, as in JAX."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (32, 64, 64, CLASSES)
        self.weights = nn.ParameterList(make_weights(*pair) for pair in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.gelu(x @ weight + bias)
        return x


class FusedAttention(nn.Module):
    """Attention whose projections are slices of one weight and einsums over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = make_weights(48, 3 * 48)
        self.out = make_weights(4, 12, 48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.matmul(x, weight) for weight in self.projection.chunk(3, 1)]
        query, key, value = (part.unflatten(-1, (4, 12)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + torch.einsum("bhld,hde->ble", mixed, self.out)
        return self.head(x.mean(1))


class EinsumMixture(nn.Module):
    """A dense mixture of experts in two einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.up, self.down = make_weights(4, 32, 48), make_weights(4, 48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bd,edh->beh", x, self.up))
        out = torch.einsum("beh,ehc->bec", hidden, self.down)
        return torch.einsum("bec,be->bc", out, self.gate(x).softmax(-1))


class BatchedExperts(nn.Module):
    """Experts as 3-D weights with `torch.bmm`, each for its own share of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = make_weights(4, 32, 48), make_weights(4, 48, 32)
        self.up_bias = nn.Parameter(torch.zeros(4, 1, 48))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(0, (4, -1))
        hidden = F.relu(torch.baddbmm(self.up_bias, rows, self.up))
        return self.head(x + torch.bmm(hidden, self.down).flatten(0, 1))


class RoutedExperts(nn.Module):
    """A mixture of linear experts; each sees only the rows that are routed to it, perhaps none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(4)
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            out = out.index_add(0, row, expert(x[row]) * weight[row, place].unsqueeze(1))
        return self.head(x + out)


class BilinearClassifier(nn.Module):
    """Two inputs that meet in `nn.Bilinear`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 24), nn.Linear(16, 24)
        self.meet = nn.Bilinear(24, 24, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return self.head(F.relu(self.meet(self.left(left).tanh(), self.right(right).tanh())))


class HyperNetwork(nn.Module):
    """A network that makes another network's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(8))
        self.hidden = nn.Linear(8, 24)
        self.make_weight, self.make_bias = nn.Linear(24, 16 * 16), nn.Linear(24, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        context = F.relu(self.hidden(self.task))
        weight = self.make_weight(context).view(16, 16)
        return self.head(F.relu(F.linear(x, weight, self.make_bias(context))))


class LoRALinear(nn.Module):
    """A linear layer, frozen, with an adapter of low rank beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, inputs) * 0.2)
        self.up = nn.Parameter(torch.randn(outputs, 4) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t() * 2.0


def make_lora() -> nn.Module:
    return nn.Sequential(LoRALinear(32, 64), nn.ReLU(), LoRALinear(64, CLASSES))


class PatchedForward(nn.Module):
    """A linear layer whose forward was replaced after it was made, to add an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 64), nn.Linear(64, CLASSES)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)
        plain = self.layer.forward
        self.layer.forward = lambda x: plain(x) + self.up(self.down(x))  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(x)))


class ReusedLayer(nn.Module):
    """The same layers applied three times over, as in a universal transformer or a neural ODE."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 0.5 * self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x)


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class FourierOperator(nn.Module):
    """A Fourier neural operator: complex weights for the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 1, 1)
        self.spectral = nn.Parameter(torch.randn(16, 16, 4, dtype=torch.cfloat) / 16)
        self.local = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        waves = torch.fft.rfft(x)[..., :4]
        smooth = torch.fft.irfft(torch.einsum("bif,iof->bof", waves, self.spectral), n=x.shape[-1])
        return self.project(F.gelu(smooth + self.local(x)))


def operate(model: nn.Module) -> Tensor:
    x = torch.randn(4, 1, 16)
    return F.mse_loss(model(x), x.cumsum(-1))


class SplineNetwork(nn.Module):
    """A Kolmogorov-Arnold network: radial bases of each input, then one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_weights(16, 6, 32), make_weights(32, 6, CLASSES)
        self.first_base, self.second_base = nn.Linear(16, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for weight, base in ((self.first, self.first_base), (self.second, self.second_base)):
            bases = torch.exp(-(x.unsqueeze(-1) - torch.linspace(-2, 2, 6)).square())
            x = base(F.silu(x)) + torch.einsum("big,igo->bo", bases, weight)
        return x


class SparseGraphNetwork(nn.Module):
    """Graph convolutions by a sparse adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_weights(32, 64), make_weights(64, CLASSES)
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.arange(x.shape[0])
        edges = torch.stack([nodes, nodes.roll(1)])
        ones = torch.ones(x.shape[0])
        adjacency = torch.sparse_coo_tensor(edges, ones, (len(ones), len(ones)), check_invariants=True)
        hidden = F.relu(torch.sparse.mm(adjacency, x @ self.first) + self.bias)
        return torch.sparse.mm(adjacency, hidden @ self.second)


class MlpMixer(nn.Module):
    """Linear layers along tokens and along channels in turn, over transposed inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.tokens = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.channels = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for mix_tokens, mix_channels in zip(self.tokens, self.channels, strict=True):
            x = x + F.gelu(mix_tokens(x.transpose(1, 2))).transpose(1, 2)
            x = x + F.gelu(mix_channels(x))
        return self.head(self.norm(x))


UNUSUAL = (
    Family("weight norm", make_weight_norm, classify(8, 32)),
    Family("spectral norm", make_spectral_norm, classify(4, 3, 16, 16)),
    Family("orthogonal", make_orthogonal, classify(8, 32)),
    Family("pruned", make_pruned, classify(8, 32)),
    Family("tied autoencoder", TiedAutoencoder, reconstruct),
    Family("bare parameters", HandWritten, classify(8, 32)),
    Family("fused attention", FusedAttention, classify(4, 6, 48)),
    Family("einsum experts", EinsumMixture, classify(8, 32)),
    Family("bmm experts", BatchedExperts, classify(16, 32)),
    Family("routed experts", RoutedExperts, classify(8, 32)),
    Family("bilinear", BilinearClassifier, classify(8, 32)),
    Family("hypernetwork", HyperNetwork, classify(8, 16)),
    Family("lora by hand", make_lora, classify(8, 32)),
    Family("patched forward", PatchedForward, classify(8, 32)),
    Family("reused layers", ReusedLayer, classify(8, 32)),
    Family("checkpointed", Checkpointed, classify(8, 32)),
    Family("fourier operator", FourierOperator, operate),
    Family("spline network", SplineNetwork, classify(8, 16)),
    Family("sparse graph", SparseGraphNetwork, classify(16, 32)),
    Family("mlp-mixer", MlpMixer, predict_tokens),
)
