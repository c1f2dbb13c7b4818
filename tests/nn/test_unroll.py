"""Unrolled recurrent layers compute what the fused ones do, and every product is a call that can be seen."""

import doctest
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent import CELLS, FUSED, INPUTS, LAYERS, Watch, assert_same, flatten, make_input, make_state
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from plywise.nn import unroll

# the fused layer says that it has no faster kernel for this
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


# ---- the same numbers -----------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(FUSED)),
    form=st.sampled_from(INPUTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    with_state=st.booleans(),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
)
def test_outputs_states_and_gradients_are_the_fused_layers(kind, form, dtype, with_state, layers, **settings):
    torch.manual_seed(0)
    cls, more = FUSED[kind]
    fused = cls(3, 5, num_layers=layers, dtype=dtype, **settings, **more)
    arguments = [make_input(form, settings["batch_first"], dtype)]
    if with_state:
        arguments.append(make_state(fused, form, dtype))
    assert_same(fused, unroll(fused), *arguments)


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("kind", FUSED)
def test_every_kind_of_layer_and_input_with_everything_at_once(kind, form):
    cls, more = FUSED[kind]
    fused = cls(3, 5, num_layers=2, bidirectional=True, batch_first=True, **more)
    arguments = make_input(form, True, torch.float32), make_state(fused, form, torch.float32)
    assert_same(fused, unroll(fused), *arguments)


@pytest.mark.parametrize("kind", FUSED)
def test_a_long_sequence_through_a_wider_layer(kind):
    cls, more = FUSED[kind]
    fused = cls(24, 64, **more)
    assert_same(fused, unroll(fused), torch.randn(60, 16, 24))


@pytest.mark.parametrize("lengths", [(3,), (5, 5, 5), (6, 5, 4, 3, 2, 1), (1, 1, 7)])
@pytest.mark.parametrize("cls", LAYERS)
def test_packed_sequences_of_many_lengths(cls, lengths):
    fused = cls(3, 5, bidirectional=True, dtype=torch.float64)
    packed = make_input("unsorted", False, torch.float64, lengths)
    assert_same(fused, unroll(fused), packed)
    output, _ = unroll(fused)(packed)
    for mine, theirs in zip(output[1:], fused(packed)[0][1:], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (3,), (0, 3)])
@pytest.mark.parametrize("cls", [*CELLS, "relu"])
def test_cells(cls, shape, with_state, bias):
    more = {"nonlinearity": "relu"} if cls == "relu" else {}
    cls = nn.RNNCell if cls == "relu" else cls
    fused = cls(3, 5, bias=bias, dtype=torch.float64, **more)
    state = [torch.randn(*shape[:-1], 5, dtype=torch.float64) for _ in range(2)]
    state = state if cls is nn.LSTMCell else state[0]
    assert_same(fused, unroll(fused), torch.randn(shape, dtype=torch.float64), *[state] * with_state)


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("cls", LAYERS)
def test_dropout_draws_the_same_masks_on_a_cpu(cls, form):
    fused = cls(3, 5, num_layers=3, dropout=0.4, bidirectional=True, batch_first=True, dtype=torch.float64)
    unrolled, x = unroll(fused), make_input(form, True, torch.float64)
    results = []
    for layer in (fused, unrolled):
        torch.manual_seed(3)
        results.append(flatten(layer(x)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    plain = flatten(unrolled.eval()(x))
    assert not torch.allclose(plain[0], results[1][0])
    torch.testing.assert_close(plain, flatten(fused.eval()(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", LAYERS)
def test_dropout_of_everything(cls):
    fused = cls(3, 5, num_layers=2, dropout=1.0)
    assert_same(fused, unroll(fused), torch.randn(4, 2, 3))


@pytest.mark.parametrize("cls", LAYERS)
def test_an_empty_batch(cls):
    fused = cls(3, 5, num_layers=2, bidirectional=True)
    wanted, got = flatten(fused(torch.randn(4, 0, 3))), flatten(unroll(fused)(torch.randn(4, 0, 3)))
    assert [t.shape for t in got] == [t.shape for t in wanted]


@pytest.mark.parametrize("cls", LAYERS)
def test_training_ends_at_the_same_weights(cls):
    fused = cls(3, 5, num_layers=2, dtype=torch.float64)
    unrolled, x = unroll(fused), torch.randn(7, 4, 3, dtype=torch.float64)
    for layer in (fused, unrolled):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x)[0] - x.sum(2, keepdim=True).sin()).square().mean().backward()
            optimizer.step()
    for p, q in zip(fused.parameters(), unrolled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", LAYERS)
def test_second_derivatives(cls):
    fused, x = cls(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    first, second = (
        torch.autograd.functional.hvp(lambda x, layer=layer: layer(x)[0].sin().sum(), x, torch.ones_like(x))[
            1
        ]
        for layer in (fused, unroll(fused))
    )
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", LAYERS)
def test_autocast_runs_in_fewer_bits(cls):
    fused, x = cls(3, 5, num_layers=2), make_input("padded", False, torch.float32)
    unrolled, state = unroll(fused), make_state(fused, "padded", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = flatten(unrolled(x)) + flatten(unrolled(x, state))
    assert {t.dtype for t in outputs} == {torch.bfloat16}
    torch.testing.assert_close(outputs[0].float(), fused(x)[0], rtol=0.05, atol=0.05)


# ---- calls that can be seen -----------------------------------------------------------------------


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("kind", FUSED)
def test_every_weight_is_the_weight_of_calls_of_linear(kind, form):
    cls, more = FUSED[kind]
    layer = unroll(cls(3, 5, num_layers=2, bidirectional=True, **more))
    with Watch(layer) as watch:
        layer(make_input(form, False, torch.float32))
    wanted = {name: 1 if "_ih_" in name else 6 for name, _ in layer.named_parameters() if "weight" in name}
    assert watch.linear == wanted
    assert not watch.kernels


@pytest.mark.parametrize("cls", CELLS)
def test_both_weights_of_a_cell_are_seen(cls):
    cell = unroll(cls(3, 5))
    with Watch(cell) as watch:
        cell(torch.randn(2, 3))
    assert watch.linear == {"weight_ih": 1, "weight_hh": 1}
    assert not watch.kernels


def test_a_fused_layer_hides_its_calls():
    """Else the tests above would say nothing."""
    with Watch(layer := nn.LSTM(3, 5)) as watch:
        layer(torch.randn(2, 1, 3))
    assert not watch.linear
    assert watch.kernels == {"lstm"}


# ---- wrong arguments ------------------------------------------------------------------------------

X, H = torch.randn(4, 2, 3), torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 2, 2),),
        (torch.randn(4, 2, 2, 3),),
        (torch.randn(3),),
        (torch.randn(0, 2, 3),),
        (X.double(),),
        (X, H[:, :1]),
        (X, H[0]),
        (X, H.double()),
        (X[0], H),
    ],
)
@pytest.mark.parametrize("cls", LAYERS)
def test_wrong_arguments_of_a_layer_fail_as_they_did(cls, arguments):
    if cls is nn.LSTM and len(arguments) > 1:
        arguments = arguments[0], (arguments[1], arguments[1])
    fused = cls(3, 5)
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        fused(*arguments)
    with pytest.raises(wanted.type):
        unroll(fused)(*arguments)


@pytest.mark.parametrize("cls", LAYERS)
def test_wrong_packed_arguments_fail(cls):
    """The fused LSTM checks neither of them, and gives numbers."""
    unrolled = unroll(cls(3, 5))
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        unrolled(pack_sequence([torch.randn(2, 4)]))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        unrolled(pack_sequence([torch.randn(2, 3)]), (H, H) if cls is nn.LSTM else H)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 2),),
        (torch.randn(4, 2, 3),),
        (torch.randn(2, 3), torch.randn(1, 5)),
        (torch.randn(2, 3), torch.randn(5)),
        (torch.randn(2, 3), torch.randn(2, 4)),
        (torch.randn(3), torch.randn(2, 5)),
        (torch.randn(2, 3).double(),),
    ],
)
@pytest.mark.parametrize("cls", CELLS)
def test_wrong_arguments_of_a_cell_fail_as_they_did(cls, arguments):
    if cls is nn.LSTMCell and len(arguments) > 1:
        arguments = arguments[0], (arguments[1], arguments[1])
    fused = cls(3, 5)
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        fused(*arguments)
    with pytest.raises(wanted.type):
        unroll(fused)(*arguments)


def test_examples_in_the_docstrings():
    assert doctest.testmod(sys.modules["plywise.nn.unroll"]).failed == 0
