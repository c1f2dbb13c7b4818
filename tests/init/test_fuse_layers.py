"""Layer fusion against slow least squares, composed maps, and runs that cannot be fused."""

import copy
import doctest
import sys

import pytest
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.errors import NonFiniteError, PlywiseError
from plywise.init import fuse_layers, fuse_slice


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(x):
    return torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)


def digits(count):
    return load_digits()[0].x[:count].double()


def test_identity_between_two_linears_gives_their_product():
    run = nn.Sequential(nn.Linear(8, 20), nn.Identity(), nn.Linear(20, 5))
    fused = fuse_layers(run, torch.randn(200, 8), damping=0)
    first, second = run[0], run[2]
    torch.testing.assert_close(fused.weight, second.weight @ first.weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(fused.bias, second.weight @ first.bias + second.bias, rtol=0, atol=1e-14)


def test_residual_is_orthogonal_to_inputs_and_ones():
    run = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(300, 8) + 3
    fused = fuse_layers(run, x, damping=0)
    with torch.no_grad():
        residual = run(x) - fused(x)
    assert residual.abs().max() > 0.01
    assert (rows_of(x).T @ residual).abs().max() / len(x) < 1e-13


def test_fused_layer_is_slow_least_squares_and_no_other_affine_map_is_nearer():
    run = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 5))
    x = torch.randn(300, 8)
    fused = fuse_layers(run, x, damping=0)
    with torch.no_grad():
        y = run(x)
        slow = torch.linalg.lstsq(rows_of(x), y).solution.T
        best = (fused(x) - y).square().mean()
        torch.testing.assert_close(torch.cat([fused.weight, fused.bias[:, None]], 1), slow)
        for scale in (1e-3, 1e-1, 10.0):
            other = copy.deepcopy(fused)
            for parameter in other.parameters():
                parameter += scale * torch.randn_like(parameter)
            assert (other(x) - y).square().mean() > best


def test_damping_is_the_papers_formula():
    run = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    x, damping = torch.randn(100, 6) + 1, 0.3
    fused = fuse_layers(run, x, damping=damping)
    with torch.no_grad():
        hidden = run[:2](x)
        a, h = x - x.mean(0), hidden - hidden.mean(0)
        joint = run[2].weight @ (h.T @ a) / len(x)
        weight = joint @ torch.linalg.inv(a.T @ a / len(x) + damping * torch.eye(6))
        bias = run[2].weight @ hidden.mean(0) - weight @ x.mean(0) + run[2].bias
    torch.testing.assert_close(fused.weight, weight)
    torch.testing.assert_close(fused.bias, bias)


def test_batches_give_what_all_at_once_gives_and_loaders_too():
    run = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    x = torch.randn(100, 6)
    whole = fuse_layers(run, x)
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(100))
    for batches in (x.split(30), iter([x[:1], x[:0], x[1:]]), torch.utils.data.DataLoader(dataset, 7)):
        parts = fuse_layers(run, batches)
        torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-12)


def test_dead_and_doubled_inputs_get_the_solution_of_least_norm():
    x = digits(400)
    x = torch.cat([x, x[:, 20:21]], 1)
    assert (x.std(0) == 0).any()
    run = nn.Sequential(nn.Linear(65, 30), nn.ReLU(), nn.Linear(30, 10))
    fused = fuse_layers(run, x, damping=0)
    with torch.no_grad():
        y = run(x)
        slow = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution.T
    torch.testing.assert_close(fused.weight, slow, rtol=0, atol=1e-9)
    assert fused.weight[:, x.std(0) == 0].abs().max() < 1e-11


CHAINS = {
    "strides": (nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 5, 2, stride=2)),
    "oblong": (nn.Conv2d(2, 4, (3, 1), stride=(1, 2)), nn.Conv2d(4, 5, (2, 3), stride=(2, 1))),
    "dilated": (nn.Conv2d(2, 4, 2, dilation=2), nn.Conv2d(4, 5, 2, stride=2)),
    "grouped": (nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 6, 2, groups=2)),
    "average pool between": (nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 5, 2)),
    "three in a row": (nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 5, 2)),
    "nested": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Identity()), nn.Sequential(nn.Conv2d(4, 5, 2))),
    "pointwise": (nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 1)),
    "padding of the first alone": (nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 5, 3)),
    "same": (nn.Conv2d(2, 4, 1, padding="same"), nn.Conv2d(4, 5, 3, padding="valid")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_linear_chains_of_convolutions_become_one_exactly(name):
    run = nn.Sequential(*CHAINS[name]).double()
    x = torch.randn(60, 2, 9, 11)
    fused = fuse_layers(run, x, damping=0)
    assert isinstance(fused, nn.Conv2d)
    unseen = torch.randn(4, 2, 12, 14)
    torch.testing.assert_close(fused(unseen), run(unseen), rtol=0, atol=1e-10)


def test_composed_kernel_stride_and_padding():
    run = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 5, stride=3, padding=2)
    )
    fused = fuse_layers(run, torch.randn(10, 3, 20, 23))
    assert (fused.kernel_size, fused.stride, fused.padding) == ((11, 11), (6, 6), (5, 5))


@pytest.mark.parametrize(("conv", "size"), [(nn.Conv1d, (12,)), (nn.Conv3d, (6, 7, 5))])
def test_other_dimensions(conv, size):
    run = nn.Sequential(conv(2, 3, 2, stride=2), conv(3, 4, 2))
    x = torch.randn(80, 2, *size)
    fused = fuse_layers(run, x, damping=0)
    assert type(fused) is conv
    torch.testing.assert_close(fused(x), run(x), rtol=0, atol=1e-10)


def test_convolutions_with_activation_and_padding_are_least_squares_on_patches():
    run = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    x = digits(60).reshape(60, 1, 8, 8)
    fused = fuse_layers(run, x, damping=0)
    patches = nn.functional.unfold(x, 5, padding=2).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        y = run(x).flatten(2).transpose(1, 2).flatten(0, 1)
        ours = fused(x).flatten(2).transpose(1, 2).flatten(0, 1)
        best = rows_of(patches) @ torch.linalg.lstsq(rows_of(patches), y, driver="gelsd").solution
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-9)


def test_convolution_and_head_become_a_linear_on_pixels_whatever_is_between():
    run = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(36, 10),
    )
    x = digits(300).reshape(300, 1, 8, 8)
    run(x)  # the norm's statistics are not those of a fresh one
    before, modes = copy.deepcopy(run.state_dict()), [part.training for part in run.modules()]
    fused = fuse_layers(run, x, damping=1e-9)
    assert (fused.in_features, fused.out_features) == (64, 10)
    torch.testing.assert_close(run.state_dict(), before, rtol=0, atol=0)
    assert [part.training for part in run.modules()] == modes
    run.eval()
    with torch.no_grad():
        residual = run(x) - fused(x.flatten(1))
    assert (rows_of(x).T @ residual).abs().max() / len(x) < 1e-8


def test_sequences_fuse_position_by_position():
    run = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    x = torch.randn(20, 5, 6)
    torch.testing.assert_close(fuse_layers(run, x).weight, fuse_layers(run, x.flatten(0, 1)).weight)


def test_dtype_and_gradients_of_the_new_layer():
    run = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).float()
    fused = fuse_layers(run, torch.randn(50, 6).float())
    assert fused.weight.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.grad is None for parameter in run.parameters())


def test_slice_is_fused_on_what_reaches_it_and_the_model_stays():
    x = digits(300).reshape(300, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    shallow = fuse_slice(model, 2, 6, [(x, None)], damping=0)
    assert [type(part) for part in shallow] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    with torch.no_grad():
        front = model[:2](x)
        residual = model(x) - shallow(x)
    assert (rows_of(front).T @ residual).abs().max() / len(x) < 1e-9
    assert shallow[0].weight is not model[0].weight
    assert torch.equal(shallow[0].weight, model[0].weight)
    assert len(model) == 6
    twice = fuse_slice(shallow, 0, 4, x)  # the loop of the paper
    assert [type(part) for part in twice] == [nn.Flatten, nn.Linear]


def test_fused_head_beats_a_random_start_on_real_digits():
    torch.manual_seed(0)
    train, _, test = load_digits()
    x, tx = train.x.double(), test.x.double()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), train.y).backward()
        optimizer.step()
    shallow = fuse_slice(model, 2, 5, x)
    deep, fused = ((part(tx).argmax(1) == test.y).double().mean().item() for part in (model, shallow))
    assert deep > 0.9
    assert fused > 0.85


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf"), "1"])
def test_bad_damping(damping):
    with pytest.raises(ValueError, match="damping"):
        fuse_layers(nn.Sequential(nn.Linear(2, 2)), torch.randn(5, 2), damping=damping)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


IMAGES, ROWS = torch.randn(6, 2, 8, 8), torch.randn(6, 8)
REFUSED = [
    ((nn.Conv2d(2, 2, 3), Residual(), nn.Conv2d(2, 2, 3)), IMAGES, "Residual"),
    ((nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Conv2d(2, 2, 3)), IMAGES, "ConvTranspose2d"),
    ((nn.Conv2d(2, 2, 3), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3)), IMAGES, "shape"),
    ((nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1)), IMAGES, "shape"),
    ((nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), IMAGES, "zeros"),
    ((nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2, padding="same")), IMAGES, "one side"),
    ((nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)), IMAGES[0], "batches"),
    ((nn.Linear(8, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 3)), ROWS, "no convolution"),
    ((nn.ReLU(), nn.Flatten()), ROWS, "no Linear"),
    ((nn.Linear(8, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 2)), ROWS, "one row of outputs"),
    ((nn.Linear(8, 4), nn.Linear(4, 2)), ROWS[:0], "no input"),
    ((nn.Linear(8, 4), nn.Linear(4, 2)), [], "no input"),
]


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize(("parts", "x", "said"), REFUSED)
def test_runs_that_do_not_fuse_are_refused_with_the_reason(parts, x, said):
    run = nn.Sequential(*parts).double()
    with pytest.raises(PlywiseError, match=said):
        fuse_layers(run, x.double() if isinstance(x, torch.Tensor) else x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(bad):
    x = torch.randn(10, 3)
    x[4, 1] = bad
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        fuse_layers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), [x[:4], x[4:]])


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (-1, 2), (0, 4), (2, 1)])
def test_positions_that_are_no_slice(start, stop):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlywiseError, match="3 modules"):
        fuse_slice(model, start, stop, torch.randn(5, 3))
    with pytest.raises(PlywiseError, match="a Linear"):
        fuse_slice(nn.Linear(3, 4), 0, 1, torch.randn(5, 3))


def test_worked_examples():
    torch.set_default_dtype(torch.float32)
    assert doctest.testmod(sys.modules["plywise.init.fuse_layers"]).failed == 0
