"""Models whose layers are used in unusual ways, with what a rule has to say of each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from plywise import Rule
from plywise.engine.selection import KINDS
from plywise.testing.contract.models import Net


@dataclass(frozen=True)
class Structure:
    """A model, what is handled, and words of the reason for what is not.

    Attributes:
        name: test id.
        make: builds the model.
        shape: shape of its float input, or of token numbers below 5 if ``tokens``.
        handled: names of the layers that a rule handles.
        routed: name → words of the reason, for the others.
        unused: parameters that get no gradient.
        may_rest: parameters whose gradient may be zero.
        shared: name → words of the reason, for handled layers that a rule with running state leaves alone.
        kinds: name → kind, for layers that only a rule handles which takes that kind.
        harmless: left alone, but above every handled layer.
        computed: weights computed from these parameters; a rule that `takes_unshared_only` leaves them.
    """

    name: str
    make: Callable[[], nn.Module]
    handled: tuple[str, ...]
    routed: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = (9, 6)
    tokens: bool = False
    unused: tuple[str, ...] = ()
    may_rest: frozenset[str] = frozenset()
    shared: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    computed: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()

    def list_handled(self, rule: Rule) -> set[str]:
        """List the names of the rows that this rule handles."""
        taken = KINDS if rule.alters_backward else rule.kinds
        names = {*self.handled, *(name for name, kind in self.kinds.items() if kind in taken)}
        if not rule.takes_unshared_only:
            return names | {*self.computed}
        tied = self.kinds if self.tokens else ()
        return names - {*self.shared, *self.computed, *tied}

    def is_refused(self, rule: Rule) -> bool:
        """Tell whether a rule that sends down other values than gradients leaves something alone."""
        left = {*self.routed} - self.list_handled(rule)
        if rule.takes_unshared_only:
            left |= {*self.computed, *self.shared, *(self.kinds if self.tokens else ())}
        return rule.alters_backward and bool(left - {*self.harmless})

    def build(self) -> nn.Module:
        torch.manual_seed(11)
        return self.make()

    def compute_loss(self, model: nn.Module, samples: int | None = None) -> Tensor:
        """Compute a loss on a batch that is always the same, dropout included."""
        torch.manual_seed(12)
        shape = self.shape if samples is None else (samples, *self.shape[1:])
        dtype = next((p.dtype for p in model.parameters() if not nn.parameter.is_lazy(p)), torch.float32)
        x = torch.randint(0, 5, shape) if self.tokens else torch.randn(shape, dtype=dtype)
        out = model(x)
        target = torch.randint(0, out.shape[-1], out.shape[:-1])
        return F.cross_entropy(out.flatten(0, -2), target.flatten())


def make_tied() -> nn.Module:
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    net = Net(lambda net, x: net.head(torch.tanh(net.b(torch.tanh(net.a(x))))), **layers)
    net.b.weight = net.a.weight
    return net


def make_shared() -> nn.Module:
    layers = {"block": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    return Net(lambda net, x: net.head(torch.tanh(net.block(torch.tanh(net.block(x)) + x))), **layers)


def make_alias() -> nn.Module:
    """One layer under two names."""
    one = nn.Linear(6, 6)
    layers = {"one": one, "two": one, "head": nn.Linear(6, 3)}
    return Net(lambda net, x: net.head(torch.tanh(net.two(torch.tanh(net.one(x))))), **layers)


def make_unused() -> nn.Module:
    return Net(lambda net, x: net.used(x), used=nn.Linear(6, 3), spare=nn.Linear(6, 3))


def make_gated() -> nn.Module:
    """Two layers of which each call names those that it uses, as in ``net(x, "a")`` or ``net(x, "ab")``."""
    torch.manual_seed(1)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "head": nn.Linear(8, 3)}
    return Net(
        lambda net, x, which: net.head(torch.tanh(sum(getattr(net, name)(x) for name in which))), **layers
    )


class Positive(nn.Module):
    """Makes numbers positive, as a parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Kept(nn.Linear):
    """A subclass that keeps its forward."""


class HalvedConv(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 0.5, bias)


def make_tied_embedding() -> nn.Module:
    layers = {"embedding": nn.Embedding(5, 6), "mid": nn.Linear(6, 6), "head": nn.Linear(6, 5, bias=False)}
    net = Net(lambda net, x: net.head(torch.tanh(net.mid(net.embedding(x)))), **layers)
    net.head.weight = net.embedding.weight
    return net


def make_attention() -> nn.Module:
    layers = {"attention": nn.MultiheadAttention(6, 2, batch_first=True), "head": nn.Linear(6, 3)}
    return Net(lambda net, x: net.head(net.attention(x, x, x, need_weights=False)[0]), **layers)


def make_recurrent() -> nn.Module:
    layers = {"lstm": nn.LSTM(6, 5, batch_first=True), "head": nn.Linear(5, 3)}
    return Net(lambda net, x: net.head(net.lstm(x)[0]), **layers)


def make_shifted() -> nn.Module:
    """A layer deep in containers behind a parameter of the net's own."""
    inner = nn.ModuleDict({"deep": nn.ModuleList([nn.Sequential(nn.Linear(6, 3))])})
    net = Net(lambda net, x: net.inner["deep"][0](x + net.shift), inner=inner)
    net.shift = nn.Parameter(torch.zeros(6))
    return net


def make_patches() -> nn.Module:
    layers = {"conv": nn.Conv1d(1, 4, 3), "own": HalvedConv(4, 4, 1), "head": nn.Linear(16, 3)}
    return Net(lambda net, x: net.head(torch.tanh(net.own(net.conv(x.unsqueeze(1)))).flatten(1)), **layers)


def make_weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3))


# Softmax forgets what all keys have in common: the key bias (the middle third of in_proj_bias) has
# gradient zero up to rounding, the rest of that tensor moves.
STRUCTURES = [
    Structure(
        "tied",
        make_tied,
        ("a", "b", "head"),
        shared=dict.fromkeys(("a", "b"), "its weight is shared by 'a' and 'b'"),
    ),
    Structure("shared", make_shared, ("block", "head")),
    Structure("alias", make_alias, ("one", "head")),
    Structure("unused", make_unused, ("used", "spare"), unused=("spare.weight", "spare.bias")),
    Structure("own forward", lambda: nn.Sequential(Halved(6, 6), nn.Tanh(), Kept(6, 3)), ("0", "2")),
    Structure("own _conv_forward", make_patches, ("conv", "head"), computed=("own.weight",)),
    Structure(
        "tied embedding",
        make_tied_embedding,
        ("mid",),
        {"head": "its kind, 'embedding'", "embedding": "its kind, 'embedding'"},
        (4, 7),
        tokens=True,
        kinds={"head": "embedding", "embedding": "embedding"},
    ),
    Structure(
        "attention",
        make_attention,
        ("attention.in_proj_weight", "attention.out_proj", "head"),
        shape=(4, 5, 6),
    ),
    Structure(
        "transformer",
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True), nn.Linear(6, 3)
        ),
        ("0.self_attn.in_proj_weight", "0.self_attn.out_proj", "0.linear1", "0.linear2", "1"),
        {"0.norm1": "its kind, 'norm'", "0.norm2": "its kind, 'norm'"},
        (4, 5, 6),
        kinds={"0.norm1": "norm", "0.norm2": "norm"},
    ),
    Structure(
        "lstm",
        make_recurrent,
        ("head",),
        {"lstm.weight_ih_l0": "the fused kernels of nn.LSTM hide their calls: plywise.nn.unroll(model)"},
        (4, 5, 6),
    ),
    Structure(
        "own parameter",
        make_shifted,
        ("inner.deep.0.0",),
        {"shift": "used by add, which is not read as a linear map"},
    ),
    Structure(
        "weight_norm",
        make_weight_normed,
        ("2",),
        computed=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
    Structure(
        "lazy", lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(inplace=True), nn.LazyLinear(3)), ("0", "2")
    ),
]
