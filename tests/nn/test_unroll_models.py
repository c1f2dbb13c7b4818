"""What stays and what changes when the recurrent layers of a model are unrolled, and what is refused."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from recurrent import CELLS, LAYERS, Watch, assert_same, flatten
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import plywise as pw
from plywise.errors import PlywiseError
from plywise.nn import unroll

# ---- a whole model --------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.inner = nn.ModuleDict({"up": nn.LSTM(3, 4, bidirectional=True), "cell": nn.GRUCell(8, 5)})
        self.again = self.inner["up"]
        self.first, self.second = nn.RNN(5, 5), nn.RNN(5, 5)
        self.second.weight_hh_l0 = self.first.weight_hh_l0
        self.head = nn.Linear(5, 2)

    def forward(self, words):
        x = self.norm(self.embed(words).mT).mT
        x = self.inner["up"](x)[0] + self.again(x.flip(0))[0]
        x = torch.stack([self.inner["cell"](step) for step in x])
        return self.head(self.second(self.first(x)[0])[0])


def test_a_model_with_recurrent_layers_anywhere():
    model, words = Tagger(), torch.randint(7, (6, 3))
    model.norm.eval()
    unrolled = pw.nn.unroll(model)
    assert isinstance(unrolled, Tagger)
    torch.testing.assert_close(unrolled(words), model(words), rtol=1e-6, atol=1e-6)
    assert unrolled.again is unrolled.inner["up"]
    assert unrolled.second.weight_hh_l0 is unrolled.first.weight_hh_l0
    assert type(unrolled.head) is nn.Linear
    assert not unrolled.norm.training
    assert unrolled.training
    with Watch(unrolled) as watch:
        unrolled(words)
    assert set(watch.linear) == {
        n for n, p in unrolled.named_parameters() if "weight" in n and p.dim() == 2
    } - {"embed.weight"}


def test_the_model_stays_as_it_is():
    model = Tagger()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    unrolled = unroll(model)
    with torch.no_grad():
        for parameter in unrolled.parameters():
            parameter.add_(1)
    assert [type(m) for m in model.modules()] == classes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_checkpoints_load_either_way():
    model = Tagger()
    unrolled = unroll(model)
    assert list(model.state_dict()) == list(unrolled.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in unrolled.named_parameters()]
    for source, target in ((Tagger(), unrolled), (unroll(Tagger()), model)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        words = torch.randint(7, (4, 3))
        torch.testing.assert_close(source.eval()(words), target.eval()(words), rtol=1e-6, atol=1e-6)


def test_what_is_not_recurrent_is_copied():
    model = nn.Sequential(nn.Linear(2, 3), nn.TransformerEncoderLayer(3, 1, 4))
    unrolled = unroll(model)
    assert [type(m) for m in unrolled.modules()] == [type(m) for m in model.modules()]
    assert unrolled[0].weight is not model[0].weight
    assert torch.equal(unrolled[0].weight, model[0].weight)


def test_unrolling_twice_changes_nothing():
    once = unroll(nn.LSTM(3, 5))
    assert type(unroll(once)) is type(once)
    assert_same(once, unroll(once), torch.randn(4, 2, 3))


def test_frozen_parameters_and_hooks_stay():
    fused, calls = nn.GRU(3, 5), []
    fused.weight_hh_l0.requires_grad_(False)
    fused.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    unrolled = unroll(fused)
    unrolled(torch.randn(4, 2, 3))[0].sum().backward()
    assert calls == [type(unrolled)]
    assert unrolled.weight_hh_l0.grad is None
    assert unrolled.weight_ih_l0.grad is not None


# ---- torch's own code goes on working -------------------------------------------------------------


@pytest.mark.parametrize("cls", LAYERS + CELLS)
def test_isinstance_signature_and_print(cls):
    fused = cls(3, 5)
    unrolled = unroll(fused)
    assert isinstance(unrolled, cls)
    assert list(inspect.signature(unrolled.forward).parameters) == ["input", "hx"]
    assert repr(unrolled) == f"Unrolled{fused!r}"


@pytest.mark.parametrize("cls", LAYERS + CELLS)
def test_copies_pickles_and_files(cls):
    unrolled, x = unroll(cls(3, 5)), torch.randn(4, 3)
    wanted = flatten(unrolled(x))
    file = io.BytesIO()
    torch.save(unrolled, file)
    file.seek(0)
    copies = (
        copy.deepcopy(unrolled),
        pickle.loads(pickle.dumps(unrolled)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(unrolled)
        torch.testing.assert_close(flatten(other(x)), wanted, rtol=0, atol=0)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(flatten(other(x))[0], wanted[0])


@pytest.mark.parametrize("cls", LAYERS)
def test_moved_replaced_and_functional_weights(cls):
    fused = cls(3, 5)
    unrolled = unroll(fused)
    unrolled.flatten_parameters()
    assert_same(
        fused.to(torch.float64), unrolled.to(torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    )
    assert [[tuple(w.shape) for w in ws] for ws in unrolled.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in fused.all_weights
    ]
    x, others = torch.randn(4, 2, 3), {n: torch.randn_like(p).float() for n, p in fused.named_parameters()}
    others = {name: value.requires_grad_() for name, value in others.items()}
    wanted = torch.func.functional_call(fused, others, (x,))[0]
    torch.testing.assert_close(torch.func.functional_call(unrolled, others, (x,))[0], wanted)
    copy.deepcopy(unrolled)
    for layer in (fused, unrolled):
        layer.float().weight_hh_l0 = nn.Parameter(torch.eye(len(layer.weight_hh_l0), 5))
    assert_same(fused, unrolled, x)


def test_compiled_layers_are_copied_uncompiled():
    """Else the copy would call the kernel of the layer that it was copied from."""
    fused = nn.LSTM(3, 5)
    fused.compile(backend="eager")
    layer = unroll(fused)
    with Watch(layer) as watch:
        layer(torch.randn(2, 1, 3))
    assert watch.linear == {"weight_ih_l0": 1, "weight_hh_l0": 2}


class Doubled(nn.LSTM):
    """A user's own: it does something more around torch's forward."""

    def forward(self, input, hx=None):
        output, state = super().forward(2 * input, hx)
        return output + 1, state


def test_a_subclass_that_calls_torchs_forward():
    fused, x = Doubled(3, 5), torch.randn(4, 2, 3)
    unrolled = unroll(fused)
    assert isinstance(unrolled, Doubled)
    assert type(unrolled) is type(unroll(fused))
    assert_same(fused, unrolled, x)
    for other in (copy.deepcopy(unrolled), pickle.loads(pickle.dumps(unrolled))):
        assert type(other) is type(unrolled)
        assert_same(fused, other, x)
    with Watch(unrolled) as watch:
        unrolled(x)
    assert watch.linear == {"weight_ih_l0": 1, "weight_hh_l0": 4}


# ---- weights that are computed --------------------------------------------------------------------


@pytest.mark.parametrize("after_forward", [True, False])
@pytest.mark.parametrize("cls", [*LAYERS, Doubled])
def test_parametrized_weights_keep_working(cls, after_forward):
    fused, x = parametrizations.weight_norm(cls(3, 5), "weight_hh_l0"), torch.randn(4, 2, 3)
    if after_forward:  # the cache of a fused layer then holds a result that cannot be copied
        fused(x)
    unrolled = unroll(fused)
    assert isinstance(unrolled, cls)
    assert list(unrolled.state_dict()) == list(fused.state_dict())
    assert_same(fused, unrolled, x)
    assert_same(fused, copy.deepcopy(unrolled), x)
    with torch.no_grad():
        unrolled.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.allclose(unrolled(x)[0], fused(x)[0])
    parametrize.remove_parametrizations(unrolled, "weight_hh_l0")
    assert type(unrolled) is type(unroll(cls(3, 5)))
    unrolled(x)
    assert isinstance(unrolled.weight_hh_l0, nn.Parameter)


def test_two_parametrized_layers_do_not_mix():
    model = nn.ModuleList(
        parametrizations.weight_norm(nn.GRU(3, 3), f"weight_{side}_l0") for side in ("ih", "hh")
    )
    for fused, unrolled in zip(model, unroll(model), strict=True):
        assert_same(fused, unrolled, torch.randn(4, 2, 3))


def test_an_unrolled_layer_can_be_parametrized():
    fused, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    unrolled = parametrizations.weight_norm(unroll(fused), "weight_hh_l0")
    assert_same(parametrizations.weight_norm(fused, "weight_hh_l0"), unrolled, x)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRUCell])
def test_weights_that_a_hook_computes(cls):
    """torch's older way, with the weight a plain attribute."""
    fused, x = cls(3, 5), torch.randn(4, 3)
    name = "weight_ih" if cls is nn.GRUCell else "weight_ih_l0"
    prune.l1_unstructured(fused, name, 0.5)
    fused(x)
    unrolled = unroll(fused)
    assert_same(fused, unrolled, x)
    with torch.no_grad():
        getattr(unrolled, f"{name}_orig").mul_(2)
    assert not torch.allclose(flatten(unrolled(x))[0], flatten(fused(x))[0])


# ---- what is refused ------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(3, 5)

    def forward(self, x):
        return self.memory(x)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(Wrapped()),
        lambda: torch.jit.script(nn.Linear(3, 5)),
        lambda: torch.jit.freeze(torch.jit.script(Wrapped().eval())),
        lambda: torch.jit.trace(nn.RNN(3, 5), torch.randn(2, 1, 3)),
    ],
)
def test_compiled_by_jit(make):
    """Even a Linear: gradients of a copy would go to the original."""
    with pytest.raises(PlywiseError, match=r"unroll: module '1\.a', a \w+, is compiled by torch\.jit"):
        unroll(nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"a": make()})))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
def test_quantised(name):
    layer = getattr(torch.ao.nn.quantized.dynamic, name)(3, 5)
    with pytest.raises(PlywiseError, match=f"unroll: module 'down', a {name}, is quantised"):
        unroll(nn.ModuleDict({"up": nn.Linear(2, 3), "down": layer}))
    with pytest.raises(PlywiseError, match=f"unroll: the model itself, a {name}, is quantised"):
        unroll(layer)


def test_a_forward_replaced_on_the_module():
    model = Wrapped()
    old = model.memory.forward
    model.memory.forward = lambda *args: old(*args)
    with pytest.raises(PlywiseError, match=r"unroll: module 'memory', a LSTM, is replaced in its forward"):
        unroll(model)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"unroll: model must be a torch\.nn\.Module, not type"):
        unroll(nn.LSTM)
