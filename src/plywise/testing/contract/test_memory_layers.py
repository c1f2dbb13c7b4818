"""Frozen, thawed, replaced, lazy and shared layers: the memory follows, or the rule says why not."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from plywise import AttachError, PlywiseError
from plywise.testing.cases import Case
from plywise.testing.contract.memories import (
    ROWS,
    Run,
    copy_memory,
    list_layers,
    select_layer,
    select_statistics,
    start,
)
from plywise.testing.contract.models import (
    are_finite,
    compute_gradients,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
)
from plywise.testing.contract.structures import STRUCTURES, Positive


@pytest.mark.one_of_family
@pytest.mark.parametrize("first", [0, 3, 4])
@pytest.mark.parametrize("with_pending", [False, True])
def test_a_bias_frozen_and_thawed(memory_case: Case, first: int, with_pending: bool) -> None:
    # its column leaves the statistics: they start again, in that layer only
    run = start(memory_case, steps=first)
    other = start(memory_case, steps=first)
    for number in range(first, first + 6):
        run.optimizer.zero_grad()
        if with_pending and number in (first, first + 3):
            run.backward(90)
            run.optimizer.zero_grad()
        if number in (first, first + 3):
            run.model[2].bias.requires_grad_(number != first)
            run.model[2].bias.grad = None
        bias = run.model[2].bias.detach().clone()
        run.backward(number)
        run.optimizer.step()
        other.step(number)
        assert are_finite(run.copy_state())
        assert torch.equal(run.model[2].bias, bias) == (number < first + 3)
        if number == first and first:
            for layer in "04":
                mine, its = (select_statistics(one.copy_memory(), layer) for one in (run, other))
                assert have_same_bits(mine, its), layer
            if memory_case.remembers_rows:
                assert not have_same_bits(
                    *(select_statistics(one.copy_memory(), "2") for one in (run, other))
                )
    width = {value.shape[-1] for key, value in run.copy_memory().items() if key.endswith("/2/input")}
    assert width <= {9}
    assert not run.rule.health.counts


def test_a_frozen_bias_is_a_layer_without_one(memory_case: Case) -> None:
    run = start(memory_case)
    run.model[2].bias.requires_grad_(False)
    run.restart()
    bare = start(memory_case)
    bias, bare.model[2].bias = bare.model[2].bias.detach(), None
    bare.model[2].register_forward_hook(lambda module, args, output: output + bias)
    bare.restart(SGD(bare.model.parameters(), lr=0.05, momentum=0.9))
    for number in range(6):
        run.step(number)
        bare.step(number)
    assert have_same_bits(run.copy_memory(), bare.copy_memory())
    for name, value in copy_weights(bare.model).items():
        assert torch.equal(run.model.get_parameter(name), value), name


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_layer_frozen_and_thawed(memory_case: Case, attached: str) -> None:
    run = start(memory_case)
    if attached == "after":
        run.model[2].requires_grad_(False)
        run.restart()
    for number in range(9):
        run.model[2].requires_grad_(number >= 3)
        if number < 3:
            for parameter in run.model[2].parameters():
                parameter.grad = None
        before = copy_weights(run.model)
        run.step(number)
        moved = not torch.equal(copy_weights(run.model)["2.weight"], before["2.weight"])
        assert moved == (number >= 3)
        assert bool(select_layer(run.copy_memory(), "2")) == (number >= 3), number
        assert are_finite(run.copy_state())
    assert not run.rule.health.counts


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_a_weight_frozen_beside_a_bias_that_trains(memory_case: Case, steps: int) -> None:
    # one column is no problem to solve: its gradient stays as it is, in every step
    run = start(memory_case, steps=steps)
    if run.rule.alters_backward:
        pytest.skip("the layer above sends other values down than the plain gradient")
    run.model[2].weight.requires_grad_(False)
    run.model[2].weight.grad = None
    kept = select_layer(run.copy_memory(), "2")
    plain = make_mlp()
    for number in range(steps, steps + 4):
        plain.load_state_dict(run.model.state_dict())
        expected = compute_gradients(plain, run.make_data(number))["2.bias"]
        run.step(number)
        assert torch.allclose(run.model[2].bias.grad, expected, rtol=1e-5, atol=1e-6), number
        assert have_same_bits(select_layer(run.copy_memory(), "2"), kept)
        assert are_finite(run.copy_state())


def test_a_replaced_weight_is_named(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    with pytest.raises(AttachError, match=r"layer '\d' is not the parameter.*assign=True.*attach the rule"):
        run.step(2)
    run.restart(SGD(run.model.parameters(), lr=0.05))  # the cure that the message names
    assert all(map(are_finite, run.record(range(3))))


def test_one_replaced_weight_is_named(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    run.model[2].weight = nn.Parameter(run.model[2].weight.detach().clone())
    with pytest.raises(AttachError, match="weight of layer '2' is not the parameter"):
        run.step(2)


def test_a_replaced_weight_between_backward_and_step(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    before = run.copy_memory()
    run.backward(2)
    weight = run.model[2].weight
    run.model[2].weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(AttachError, match="weight of layer '2' is not the parameter"):
        run.optimizer.step()
    run.model[2].weight = weight
    assert have_same_bits(run.copy_memory(), before)


def test_tied_weights_have_a_statistic_for_each_use_or_are_left_alone(memory_case: Case) -> None:
    structure = next(one for one in STRUCTURES if one.name == "tied")
    model, plain = structure.build(), structure.build()
    optimizer = SGD(model.parameters(), lr=0.05)
    rule = memory_case.make().attach(model, optimizer)
    if structure.is_refused(rule):
        with pytest.raises(PlywiseError, match="would get a wrong gradient"):
            structure.compute_loss(model).backward()
        return
    rows = [row for row in rule.explain().rows if row.name in "ab"]
    assert rows
    for row in rows:
        assert row.handled is not rule.takes_unshared_only
        if rule.takes_unshared_only:
            assert "shared by" in row.reason
            assert "a statistic belongs to one layer" in row.reason
    for _ in range(4):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        structure.compute_loss(plain).backward()
        optimizer.zero_grad()
        structure.compute_loss(model).backward()
        optimizer.step()
        is_plain = torch.allclose(model.a.weight.grad, plain.a.weight.grad, rtol=1e-5, atol=1e-7)
        assert is_plain is rule.takes_unshared_only
    tied = set() if rule.takes_unshared_only else {"a", "a[b]"}
    assert list_layers(copy_memory(model, optimizer)) == {"head", *tied}


def test_weights_tied_while_attached_are_named(memory_case: Case) -> None:
    run = start(memory_case, steps=2)
    run.model[2].weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(AttachError, match="'2'"):
        run.step(2)


def test_lazy_layers_learn_from_the_first_step(memory_case: Case) -> None:
    ready = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    runs = []
    for model in (ready, lazy):
        optimizer = SGD(model.parameters(), lr=0.05)
        runs.append(Run(model, optimizer, memory_case.make().attach(model, optimizer)))
    lazy(torch.zeros(1, 6))
    lazy.load_state_dict(ready.state_dict())
    for number in range(5):
        for run in runs:
            run.step_on(make_batch((6,), ROWS, seed=number))
    assert have_same_bits(runs[1].copy_state(), runs[0].copy_state())
    assert select_layer(runs[1].copy_memory(), "0")


def test_a_computed_bias_is_learned_without_its_column(memory_case: Case) -> None:
    run = start(memory_case)
    if run.rule.alters_backward:
        pytest.skip("refused: a bias that is left to the optimizer would get a wrong gradient")
    run.rule.detach()
    nn.utils.parametrize.register_parametrization(run.model[2], "bias", Positive())
    run.restart(SGD(run.model.parameters(), lr=0.05))
    assert all(map(are_finite, run.record(range(5))))
    assert not run.rule.health.counts
