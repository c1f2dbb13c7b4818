"""Splitting: the blocks are the model, on its own tensors, evenly priced, or the error says why not."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from split_models import CASES, MODELS, BasicBlock, Doubles, Scale, chain, make, owners
from torch import nn

import plywise as pw
from plywise.local.split import balance


def set_mode(modules, training):
    for module in modules:
        module.train(training)


def run(modules, parameters, x):
    """Output and gradients, with the same random numbers each time."""
    torch.manual_seed(1)
    output = chain(modules, x.clone())
    return output, torch.autograd.grad(output.square().sum(), parameters)


# what the blocks are


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_the_chain_is_the_model_bit_for_bit(name, k, training):
    model, x = make(name)
    twin = copy.deepcopy(model)
    blocks = pw.split(model, k, x)
    assert len(blocks) == k
    set_mode([twin, *blocks], training)
    expected, gradients = run([twin], list(twin.parameters()), x)
    found, ours = run(blocks, list(model.parameters()), x)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients, strict=True))
    for (key, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize(("name", "k"), CASES)
def test_every_parameter_and_buffer_is_the_models_own_in_one_block_under_its_name(name, k):
    model, x = make(name)
    blocks = pw.split(model, k, x)
    for kind in ("named_parameters", "named_buffers"):
        ours = [entry for block in blocks for entry in getattr(block, kind)()]
        theirs = dict(getattr(model, kind)())
        assert sorted(key for key, _ in ours) == sorted(theirs)
        assert all(tensor is theirs[key] for key, tensor in ours)
    assert all(any(True for _ in block.parameters()) for block in blocks)
    together = [key for block in blocks for key in block.state_dict()]
    assert sorted(together) == sorted(model.state_dict())


def test_parameters_keep_the_order_of_the_model():
    model, x = make("resnet")
    names = [name for block in pw.split(model, 4, x) for name, _ in block.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda blocks: pickle.loads(pickle.dumps(blocks))])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_blocks_can_be_copied_and_pickled(name, k, way):
    model, x = make(name)
    blocks = pw.split(model, k, x)
    copies = way(tuple(blocks))
    assert [list(block.state_dict()) for block in copies] == [list(block.state_dict()) for block in blocks]
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine for block in copies for parameter in block.parameters())
    for training in (True, False):
        set_mode([*copies, *blocks], training)
        torch.manual_seed(2)
        expected = chain(blocks, x.clone())
        torch.manual_seed(2)
        assert torch.equal(chain(copies, x.clone()), expected)
    for block, other in zip(blocks, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block.buffers(), other.buffers(), strict=True))


def test_modules_in_a_row_are_a_sequential():
    model, x = make("mlp")
    for block in pw.split(model, 3, x):
        assert type(block) is nn.Sequential


def test_mode_of_a_forward_that_asks_for_it_is_the_mode_of_the_block():
    model, x = make("resnet")
    *_, last = blocks = pw.split(model.eval(), 2, x)
    assert not any(part.training for block in blocks for part in block.modules())
    features = chain(blocks[:-1], x)
    assert torch.equal(last(features), last(features))
    last.train()
    assert not torch.equal(last(features), last(features))


@pytest.mark.parametrize("k", range(1, 10))
def test_resnet_is_cut_between_its_residual_blocks(k):
    model, x = make("resnet")
    owner = owners(pw.split(model, k, x))
    for name, part in model.named_modules():
        if isinstance(part, BasicBlock):
            assert len({owner[f"{name}.{key}"] for key, _ in part.named_parameters()}) == 1


def test_resnet_comes_apart_into_stem_and_residual_blocks():
    model, x = make("resnet")
    firsts = [next(name for name, _ in block.named_parameters()) for block in pw.split(model, 9, x)]
    blocks = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1)]
    assert firsts == [f"{name}.weight" for name in ("conv1", "bn1", *blocks, "linear")]


def test_no_block_writes_into_what_it_gets():
    x = torch.randn(6, 8)
    first = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.ReLU(inplace=True), nn.Flatten())
    writers = nn.Sequential(nn.Linear(8, 8), *[Doubles() for _ in range(6)])
    for block in pw.split(nn.Sequential(first, writers, nn.Linear(8, 2)), 3, x):
        before = x.clone()
        output = block(x)
        assert torch.equal(x, before)
        x = output.detach()


def test_a_learner_trains_the_blocks():
    model, x = make("resnet")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learner = pw.AssociatedLearning(
        pw.split(model, 3, x),
        num_classes=10,
        code=4,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    assert learner.step(x, torch.arange(6)).isfinite().all()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# no trace is left


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("k", [1, 2])
def test_the_model_and_the_random_numbers_stay_as_they_are(name, k):
    model, x = make(name)
    list(model.children())[-1].eval()
    grad = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = grad
    state = copy.deepcopy(model.state_dict())
    modes = {part: part.training for part in model.modules()}
    attributes = {part: dict(vars(part)) for part in model.modules()}
    example, random = x.clone(), torch.get_rng_state()
    pw.split(model, k, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, example)
    assert x.grad is None
    assert not x.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {part: part.training for part in model.modules()} == modes
    assert {part: dict(vars(part)) for part in model.modules()} == attributes
    assert next(model.parameters()).grad is grad
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_around_it(context):
    model, x = make("mlp")
    with context():
        blocks = pw.split(model, 3, x)
    assert chain(blocks, x).requires_grad


def test_lazy_layers_are_materialised():
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    assert pw.split(model, 2, torch.randn(4, 7)).shapes == ((7,), (5,), (3,))
    assert model[2].weight.shape == (3, 5)
    assert torch.equal(model[1].running_mean, torch.zeros(5))


def test_inputs_may_be_integers():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 3))
    assert pw.split(model, 3, torch.randint(10, (5, 3))).shapes == ((3,), (3, 4), (12,), (3,))


# balance


def partitions(n, k):
    """All ways to part n units in a row into k blocks."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        yield [range(a, b) for a, b in itertools.pairwise([0, *cuts, n])]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_balance_is_optimal(costs, data):
    k = data.draw(st.integers(1, len(costs)))

    def price(parts):
        sums = [sum(costs[i] for i in part) for part in parts]
        return max(sums), sum(value**2 for value in sums)

    found = balance(costs, k)
    assert len(found) == k
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert all(found)
    assert price(found) == min(map(price, partitions(len(costs), k)))


def test_uneven_widths_are_split_by_cost_not_by_count():
    widths = [784, 2048, 2048, 1024, 1024, 512, 512, 256, 256]
    costs = [a * b for a, b in itertools.pairwise(widths)]
    parts = balance(costs, 2)
    assert [len(part) for part in parts] == [2, 6]
    by_count = max(sum(costs[:4]), sum(costs[4:]))
    assert max(sum(costs[i] for i in part) for part in parts) < 0.66 * by_count


def test_the_other_blocks_are_even_too():
    assert balance([10.0, 1.0, 1.0, 1.0, 1.0], 3) == [range(0, 1), range(1, 3), range(3, 5)]


@pytest.mark.parametrize("k", [0, 3])
def test_balance_needs_a_unit_for_each_block(k):
    with pytest.raises(pw.BlockError, match=f"2 units cannot be {k} blocks"):
        balance([1.0, 2.0], k)


def test_what_is_measured_decides():
    """The last layer does a thousand times the work of the others, whatever else the machine does."""
    model = nn.Sequential(*[Scale() for _ in range(3)], nn.Linear(2048, 2048))
    first, second = pw.split(model, 2, torch.randn(256, 2048))
    assert [len(list(block.parameters())) for block in (first, second)] == [3, 2]
