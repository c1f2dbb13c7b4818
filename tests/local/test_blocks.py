"""Blocks: shapes found on an example, nothing left behind, and what does not fit together."""

import pytest
import torch
from torch import nn

import plywise as pw


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_an_example_stays_as_it_is_where_a_block_begins_in_place():
    x = torch.randn(4, 8)
    before = x.clone()
    pw.Blocks([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3))], x)
    assert torch.equal(x, before)


def test_shapes_are_of_one_sample():
    modules = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)]
    blocks = pw.Blocks(modules, torch.randn(4, 3, 8, 8))
    assert blocks.shapes == ((3, 8, 8), (8, 6, 6), (288,), (5,))


def test_is_a_sequence_of_the_modules_given():
    modules = [nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)]
    blocks = pw.Blocks((module for module in modules), torch.randn(2, 3))
    assert len(blocks) == 3
    assert all(block is module for block, module in zip(blocks, modules, strict=True))
    assert blocks[-1] is modules[2]
    assert blocks[:2] == tuple(modules[:2])


def test_leaves_nothing_behind():
    body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    body[1].eval()
    before = {name: value.clone() for name, value in body.state_dict().items()}
    modes = [part.training for part in body.modules()]
    x = torch.randn(8, 4)
    random = torch.get_rng_state()
    pw.Blocks([body], x)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    assert [part.training for part in body.modules()] == modes
    assert all(parameter.grad is None for parameter in body.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_come_back_after_a_failure():
    body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.raises(pw.BlockError):
        pw.Blocks([body], torch.randn(8, 5))
    assert all(part.training for part in body.modules())


def test_lazy_layers_are_materialised():
    lazy = nn.LazyLinear(5)
    assert pw.Blocks([nn.Flatten(), lazy], torch.randn(2, 3, 4)).shapes == ((3, 4), (12,), (5,))
    assert lazy.weight.shape == (5, 12)


def test_a_module_without_parameters_may_come_twice():
    relu = nn.ReLU()
    assert len(pw.Blocks([nn.Linear(2, 2), relu, nn.Linear(2, 2), relu], torch.randn(3, 2))) == 4


def test_one_sample_is_enough():
    assert pw.Blocks([nn.Linear(2, 3)], torch.randn(1, 2)).shapes == ((2,), (3,))


def test_no_block():
    with pytest.raises(pw.BlockError, match="at least one module"):
        pw.Blocks([], torch.randn(2, 2))


def test_the_first_block_gets_the_inputs_of_the_model():
    with pytest.raises(
        pw.BlockError, match=r"Block 0 .* \(4, 7\) .* example's shape, which is that of the model"
    ):
        pw.Blocks([nn.Linear(8, 16), nn.Linear(16, 3)], torch.randn(4, 7))


def test_a_block_that_fails_is_named_with_what_it_got():
    with pytest.raises(pw.BlockError, match=r"Block 1 \(Linear\) fails on the \(4, 16\)") as failure:
        pw.Blocks([nn.Linear(8, 16), nn.Linear(15, 3)], torch.randn(4, 8))
    assert isinstance(failure.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Pair(), "tuple for 4 samples"),
        (nn.Flatten(0), r"\(8,\) for 4 samples"),
        (nn.Unflatten(0, (2, 2)), r"\(2, 2, 2\) for 4 samples"),
    ],
)
def test_a_block_hands_on_one_tensor_with_a_row_a_sample(module, found):
    with pytest.raises(pw.BlockError, match=rf"Block 1 \({type(module).__name__}\) hands on {found}"):
        pw.Blocks([nn.Linear(2, 2), module], torch.randn(4, 2))


def test_a_scalar_is_no_row():
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum()

    with pytest.raises(pw.BlockError, match=r"Block 0 \(Sum\) hands on \(\) for 4 samples"):
        pw.Blocks([Sum()], torch.randn(4, 2))


def test_a_shared_parameter_is_named_on_both_sides():
    first, second = nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    second[1].weight = first.weight
    with pytest.raises(pw.BlockError, match=r"Block 1 shares its '1.weight' with the 'weight' of block 0"):
        pw.Blocks([first, second], torch.randn(3, 2))


def test_a_parameter_may_be_shared_inside_a_block():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    assert len(pw.Blocks([nn.Sequential(first, second), nn.Linear(2, 2)], torch.randn(3, 2))) == 2
