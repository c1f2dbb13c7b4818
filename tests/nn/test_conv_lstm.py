"""ConvLSTM against torch's LSTM, its equations pixel by pixel, and what convolutions promise."""

import io

import pytest
import torch
from torch import nn

from plywise.nn import ConvLSTM

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


def test_on_one_pixel_it_is_an_lstm():
    layer, lstm = ConvLSTM(3, 5, kernel_size=3), nn.LSTM(3, 5)
    middle = layer.gates.weight.detach()[:, :, 1, 1]  # the rest of the kernel sees zeros
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(middle[:, :3])
        lstm.weight_hh_l0.copy_(middle[:, 3:])
        lstm.bias_ih_l0.copy_(layer.gates.bias)
        lstm.bias_hh_l0.zero_()
    x, h, c = torch.randn(4, 2, 3), torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    expected, (h_end, c_end) = lstm(x, (h, c))
    state = h[0, ..., None, None], c[0, ..., None, None]
    got, (hidden, cell) = layer(x[..., None, None], state)
    torch.testing.assert_close(got[..., 0, 0], expected)
    torch.testing.assert_close(hidden[..., 0, 0], h_end[0])
    torch.testing.assert_close(cell[..., 0, 0], c_end[0])


def test_definition():
    """Each pixel by itself, from its patch of images and states."""
    layer, images = ConvLSTM(2, 3), torch.randn(3, 1, 2, 4, 5)
    weight, bias = layer.gates.weight.detach(), layer.gates.bias.detach()
    h, c = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    for image in images[:, 0]:
        around = nn.functional.pad(torch.cat([image, h]), [1] * 4)
        h, c = h.clone(), c.clone()
        for row in range(4):
            for column in range(5):
                patch = around[:, row : row + 3, column : column + 3]
                i, f, g, o = ((weight * patch).sum((1, 2, 3)) + bias).split(3)
                c[:, row, column] = f.sigmoid() * c[:, row, column] + i.sigmoid() * g.tanh()
                h[:, row, column] = o.sigmoid() * c[:, row, column].tanh()
    outputs, state = layer(images)
    torch.testing.assert_close(outputs[-1, 0], h)
    torch.testing.assert_close(state[1][0], c)


def test_what_moves_gives_outputs_that_move():
    """Away from the border, by two steps' reach."""
    layer, images = ConvLSTM(1, 4), torch.zeros(2, 1, 1, 12, 12)
    images[..., 3:6, 3:6] = torch.randn(2, 1, 1, 3, 3)
    there, _ = layer(images)
    moved, _ = layer(images.roll((2, 3), (-2, -1)))
    torch.testing.assert_close(moved[..., 4:10, 5:11], there[..., 2:8, 2:8])


def test_a_sequence_in_two_parts():
    layer, images = ConvLSTM(2, 3), torch.randn(5, 2, 2, 4, 4)
    whole, end = layer(images)
    first, state = layer(images[:2])
    second, other = layer(images[2:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert all(torch.equal(a, b) for a, b in zip(end, other, strict=True))


def test_nothing_of_the_future_is_seen():
    layer, images = ConvLSTM(1, 3), torch.randn(4, 1, 1, 5, 5)
    before, _ = layer(images)
    images[3] += 1
    after, _ = layer(images)
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3], before[3])


def test_gradients_reach_through_time():
    layer, images = ConvLSTM(1, 2), torch.randn(3, 1, 1, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[1], images)
    layer(images)[0][-1].sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert layer.gates.weight.grad.norm() > 0


def test_begins_remembering():
    """The bias of the forget gate, and of no other, begins at 1."""
    bias = ConvLSTM(2, 3).gates.bias
    assert torch.equal(bias[3:6], torch.ones(3))
    assert not (torch.cat([bias[:3], bias[6:]]) == 1).any()


def test_state_dict():
    layer, other, images = ConvLSTM(1, 2), ConvLSTM(1, 2), torch.randn(2, 1, 1, 4, 4)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(images)[0], other(images)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 8, 4), "kernel_size must be odd, not 4"),
        ((0, 8, 3), "channels must be a whole number above 0"),
        ((1, 0, 3), "features must be a whole number above 0"),
        ((1, 8, 0), "kernel_size must be a whole number above 0"),
    ],
)
def test_wrong_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        ConvLSTM(*arguments)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (3, 1, 1, 4, 4), (0, 1, 2, 4, 4)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=r"images must be of \(T, N, 2, H, W\) with T above 0"):
        ConvLSTM(2, 3)(torch.randn(shape))
