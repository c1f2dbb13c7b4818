"""Fused recurrent layers of all kinds, inputs for them, and what compares an unrolled layer with one."""

import collections

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.overrides import TorchFunctionMode

LAYERS = [nn.RNN, nn.LSTM, nn.GRU]
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell]
FUSED = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
}
KERNELS = {"rnn_tanh", "rnn_relu", "lstm", "gru", "rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"}
INPUTS = ["padded", "single", "sorted", "unsorted"]


class Watch(TorchFunctionMode):
    """Counts calls of F.linear by the name of their weight, and names the fused kernels that run."""

    def __init__(self, model):
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.linear, self.kernels = collections.Counter(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._nn.linear:
            self.linear[self.names.get(id(args[1]))] += 1
        elif getattr(func, "__name__", "") in KERNELS:
            self.kernels.add(func.__name__)
        return func(*args, **(kwargs or {}))


def flatten(value):
    """The tensors in what a layer takes or gives."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flatten(part)] if value is not None else []


def run(layer, *arguments):
    """Outputs, and gradients of all arguments and parameters for a loss that weighs each output apart."""
    sources = [t for argument in arguments for t in flatten(argument)]
    for source in sources:
        source.requires_grad_().grad = None
    layer.zero_grad()
    outputs = flatten(layer(*arguments))
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
    sum((t * w).mean() for t, w in zip(outputs, weights, strict=True)).backward()
    gradients = [t.grad for t in sources] + [p.grad for p in layer.parameters()]
    return outputs, [None if g is None else g.clone() for g in gradients]


def assert_same(fused, unrolled, *arguments):
    wanted, got = run(fused, *arguments), run(unrolled, *arguments)
    tolerance = 1e-12 if wanted[0][0].dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert [t.stride() for t in got[0]] == [t.stride() for t in wanted[0]]


def make_input(form, batch_first, dtype, lengths=(4, 6, 1, 4)):
    if form == "single":
        return torch.randn(6, 3, dtype=dtype)
    if form == "padded":
        return torch.randn(*((4, 6) if batch_first else (6, 4)), 3, dtype=dtype)
    lengths = sorted(lengths, reverse=True) if form == "sorted" else lengths
    sequences = [torch.randn(length, 3, dtype=dtype) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=form == "sorted")


def make_state(layer, form, dtype):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if form == "single" else (4,)
    h = torch.randn(count, *batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    c = torch.randn(count, *batch, layer.hidden_size, dtype=dtype)
    return (h, c) if isinstance(layer, nn.LSTM) else h
