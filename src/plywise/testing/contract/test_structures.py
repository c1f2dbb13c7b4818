"""Tied, shared, unused, frozen, lazy, parametrized, attention, LSTM: right, or routed with a reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from plywise import AttachError, LinearCall, PlywiseError, Rule, Update
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    are_finite,
    assert_close,
    compute_gradients,
    compute_loss,
    copy_gradients,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
    train,
)
from plywise.testing.contract.structures import STRUCTURES, Positive, Structure, make_gated

STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.name)


def attach_strictly(
    rule: Rule, model: nn.Module, optimizer: torch.optim.Optimizer | None, structure: Structure
) -> Rule:
    with warnings.catch_warnings(action="error"):
        return attach(rule, model, optimizer, warm=lambda: structure.compute_loss(model, 2))


@pytest.mark.one_of_family
@STRUCTURE
def test_right_or_routed_with_a_reason(rule: Rule, structure: Structure) -> None:
    model = structure.build()
    structure.compute_loss(model).backward()  # lazy layers take their shapes
    if structure.is_refused(rule):

        def run() -> None:
            attach_strictly(rule, model, None, structure)  # a rule with memory takes steps there
            structure.compute_loss(model).backward()

        with pytest.raises(PlywiseError, match=r"would get a wrong gradient.*requires_grad_\(False\)"):
            run()
        return
    attach_strictly(rule, model, None, structure)
    structure.compute_loss(model).backward()
    table = rule.explain()
    rows = {row.name: row for row in table.rows}
    handled = structure.list_handled(rule)
    named = {name for name in rows if rows[name].handled}
    assert named == handled
    routed = {**structure.routed, **(structure.shared if rule.takes_unshared_only else {})}
    for name in routed.keys() - handled:
        assert routed[name] in rows[name].reason, rows[name].reason
        assert rows[name].treatment == "left to the optimizer"
    assert table.parameters == sum(p.numel() for p in model.parameters())  # nothing is passed over
    for name in handled - {name for name in handled if "spare" in name}:
        assert rows[name].passes >= 1, name


@pytest.mark.one_of_family
@STRUCTURE
def test_gradients_are_the_sum_of_the_moves(case: Case, rule: Rule, structure: Structure) -> None:
    # each use of a weight is one local problem; whatever is not handled keeps autograd's gradient
    if structure.is_refused(rule):
        pytest.skip("refused: see above")
    model = structure.build()
    structure.compute_loss(model)  # lazy layers take their shapes
    model.double()
    attach_strictly(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), structure)
    sums: dict[int, Tensor] = {}

    def add(ply: LinearCall, move: Update, below: Tensor | None) -> None:
        for name in ("weight", "bias"):
            part, parameter = getattr(move, name), ply.module._parameters.get(name)
            if part is not None and parameter is not None and parameter.requires_grad:
                part = part.t() if ply.map.kind == "embedding" else part.reshape(parameter.shape)
                if ply.map.kind != "computed" and parameter.shape == part.shape:
                    sums[id(parameter)] = sums.get(id(parameter), 0) + part

    model.zero_grad()
    with rule.observing(add):
        structure.compute_loss(model).backward()
    computed = {*structure.computed}
    expected = {n: sums[id(p)] for n, p in model.named_parameters() if id(p) in sums and n not in computed}
    assert expected
    assert_close({name: copy_gradients(model)[name] for name in expected}, expected)
    if case.is_backprop:
        plain = structure.build()
        structure.compute_loss(plain)
        plain.double()
        structure.compute_loss(plain).backward()
        assert_close(copy_gradients(model), copy_gradients(plain))


@pytest.mark.one_of_family
@STRUCTURE
def test_three_steps_move_all_that_can_move(case: Case, rule: Rule, structure: Structure) -> None:
    if structure.is_refused(rule):
        pytest.skip("refused: see above")
    model = structure.build()
    structure.compute_loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach_strictly(rule, model, optimizer, structure)
    before = copy_weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        structure.compute_loss(model).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    after = copy_weights(model)
    assert are_finite(after)
    assert not rule.health.counts
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad} - set(structure.unused)
    assert trainable <= moved | structure.may_rest
    assert reached <= moved


@pytest.mark.one_of_family
def test_sometimes_used(case: Case, rule: Rule) -> None:
    def both(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(x, "a") + net(x, "b"), y)

    model = make_gated()
    x, y = make_batch()
    attach(rule, model, warm=lambda: both(model))
    for which, other in ("ab", "ba", "aa", "bb"):
        model.zero_grad()
        F.cross_entropy(model(x, which), y).backward()
        found = copy_gradients(model)
        assert {f"{which}.weight", "head.weight"} <= found.keys()
        if other != which:
            assert f"{other}.weight" not in found
        fresh = make_gated()
        fresh.load_state_dict(model.state_dict())
        second = attach(case.make(), fresh, warm=lambda fresh=fresh: both(fresh))
        F.cross_entropy(fresh(x, which), y).backward()
        assert have_same_bits(found, copy_gradients(fresh))
        second.detach()


class ConstantBias:
    """Takes the bias off a layer; as its forward hook, adds it back as a constant."""

    def __init__(self, layer: nn.Module) -> None:
        self.bias = layer.bias.detach()
        layer.bias = None

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + self.bias


@pytest.mark.one_of_family
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["layer", "weight", "bias"])
def test_frozen(case: Case, rule: Rule, when: str, what: str) -> None:
    data, model = make_batch(), make_mlp(torch.float64)
    frozen = {f"2.{n}" for n in ("weight", "bias") if what in ("layer", n)}
    free, expected = make_mlp(torch.float64), make_mlp(torch.float64)
    if what == "bias":  # it is a constant: the layer's own problem has no bias
        add = ConstantBias(expected[2])
        case.make().attach(expected, torch.optim.SGD(expected.parameters(), lr=0.1))
        expected[2].register_forward_hook(add)
    else:
        case.make().attach(expected, torch.optim.SGD(expected.parameters(), lr=0.1))
    case.make().attach(free, torch.optim.SGD(free.parameters(), lr=0.1))
    data = make_batch(dtype=torch.float64)
    compute_loss(free, data).backward()
    compute_loss(expected, data).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    if when == "after":
        rule.attach(model, optimizer)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if when == "before":
        rule.attach(model, optimizer)
    compute_loss(model, data).backward()
    # the layers below receive the same, and what moves moves the same
    assert have_same_bits(
        copy_gradients(model), {n: g for n, g in copy_gradients(expected).items() if n not in frozen}
    )
    before = copy_weights(model)
    optimizer.step()
    for name, value in copy_weights(model).items():
        assert torch.equal(value, before[name]) == (name in frozen), name
    if what != "bias":
        assert "frozen" in str(rule.explain())
    if rule.remembers:
        return  # the step taken is in its memory; see test_memory_layers.py
    for name in frozen:  # thawed again
        model.get_parameter(name).requires_grad_(True)
    model.load_state_dict(free.state_dict())
    model.zero_grad()
    compute_loss(model, data).backward()
    assert have_same_bits(copy_gradients(model), copy_gradients(free))


def test_all_frozen_passes_the_gradient_down(case: Case, rule: Rule) -> None:
    if rule.alters_backward:
        pytest.skip("the backward values are altered for the sake of updates: nothing learns, they are plain")
    model, data = make_mlp(), make_batch()
    case_free = make_mlp()
    attach(case.make(), case_free, warm=(6,))
    results = []
    for net in (case_free, model):
        if net is model:
            attach(rule, model, warm=(6,))
            model.requires_grad_(False)
        x = data[0].clone().requires_grad_()
        compute_loss(net, (x, data[1])).backward()
        results.append(x.grad)
    assert torch.equal(*results)
    assert not copy_gradients(model)


def test_lazy_layers(case: Case, rule: Rule) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))

    data, model, ready = make_batch((2, 6, 6)), build(), build()
    attach(rule, model)
    assert "lazy" in str(rule.explain())
    torch.manual_seed(2)
    compute_loss(model, data).backward()
    torch.manual_seed(2)
    ready(data[0])
    attach(case.make(), ready)
    compute_loss(ready, data).backward()
    assert have_same_bits(copy_gradients(model), copy_gradients(ready))
    assert "3×64" in str(rule.explain())


def add_old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


PARAMETRIZE = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": add_old_spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


@pytest.mark.one_of_family
@pytest.mark.parametrize("kind", list(PARAMETRIZE))
def test_computed_weights(case: Case, rule: Rule, kind: str) -> None:
    model, data = make_mlp(torch.float64), make_batch(dtype=torch.float64)
    PARAMETRIZE[kind](model[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if rule.alters_backward and rule.takes_unshared_only:
        with pytest.raises(PlywiseError, match="would get a wrong gradient"):
            attach(rule, model, optimizer, warm=(6,))
        return
    attach(rule, model, optimizer, warm=(6,))
    compute_loss(model, data).backward()
    found = copy_gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert are_finite(found)
    if case.is_backprop and kind in ("weight_norm", "pruned"):  # the others draw or iterate
        plain = make_mlp(torch.float64)
        PARAMETRIZE[kind](plain[2])
        plain.load_state_dict(model.state_dict())
        compute_loss(plain, data).backward()
        assert_close(found, copy_gradients(plain))
    rows = [row for row in rule.explain().rows if row.name.startswith("2.") and "bias" not in row.name]
    reasons = [row.reason for row in rows]
    assert reasons
    assert all("weight is computed" in reason for reason in reasons), reasons


@pytest.mark.one_of_family
@pytest.mark.parametrize("kind", list(PARAMETRIZE))
def test_weights_that_become_computed_while_attached(case: Case, rule: Rule, kind: str) -> None:
    # captured as they are computed, left to the optimizer, or refused by name; never a wrong gradient
    model, data = make_mlp(), make_batch()
    rule.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    PARAMETRIZE[kind](model[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if rule.remembers and (rule.alters_backward or not rule.takes_unshared_only):
        with pytest.raises(PlywiseError, match=r"'2"):
            compute_gradients(model, data)
    else:
        found = compute_gradients(model, data)
        assert are_finite(found)
        if kind == "weight_norm" and not rule.remembers:  # others draw, iterate, or wait for the step
            other = make_mlp()
            PARAMETRIZE[kind](other[2])
            attach(case.make(), other, torch.optim.SGD(other.parameters(), lr=0.01))
            assert have_same_bits(found, compute_gradients(other, data))
        rows = [row for row in rule.explain().rows if row.name[:1] == "2" and "bias" not in row.name]
        assert rows
        known = ("weight is computed", "no call of a linear map has been seen with it yet")
        assert all(any(part in row.reason for part in known) for row in rows), [row.reason for row in rows]
    rule.detach()
    rule.attach(model, optimizer)  # the cure
    if not rule.alters_backward or not rule.remembers:
        train(model, optimizer, data, 2)


def test_a_computed_bias(case: Case, rule: Rule) -> None:
    if rule.alters_backward:
        pytest.skip("refused: a bias that is left to the optimizer would get a wrong gradient")

    results = []
    for attaching in (False, True):
        model = make_mlp(torch.float64)
        nn.utils.parametrize.register_parametrization(model[2], "bias", Positive())
        if attaching:
            attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.01), warm=(6,))
        compute_loss(model, make_batch(dtype=torch.float64)).backward()
        results.append(copy_gradients(model))
    assert results[0].keys() == results[1].keys()
    if case.is_backprop:
        assert_close(results[1], results[0])


def test_a_model_of_nothing_supported_is_refused(rule: Rule) -> None:
    with pytest.raises(AttachError, match=r"finds no layer.*LSTM.*nn\.LSTM hide.*nn\.unroll.*register_map"):
        attach(rule, nn.LSTM(3, 4))
    with pytest.raises(AttachError, match="it has no parameters"):
        rule.attach(nn.Sequential(nn.ReLU()), torch.optim.SGD(make_mlp().parameters(), lr=0.1))


def test_a_forward_set_on_the_module_itself_is_captured(case: Case, rule: Rule) -> None:
    # the rule acts on the linear call inside; what is done with its output is autograd's
    model, data = make_mlp(torch.float64), make_batch(dtype=torch.float64)
    layer = model[2]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias).square()
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    found = compute_gradients(model, data)
    assert next(row for row in rule.explain().rows if row.name == "2").handled
    if case.is_backprop:
        rule.detach()
        assert_close(found, compute_gradients(model, data))


@pytest.mark.filterwarnings("ignore:.*did not pass through the rule:RuntimeWarning")
def test_functions_of_a_weight_outside_its_layer(rule: Rule) -> None:
    # a penalty reaches the weight by another road, in the same backward: both add up
    model, data = make_mlp(), make_batch()
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    compute_loss(model, data).backward()
    bare = copy_gradients(model)["2.weight"]
    model.zero_grad()
    (compute_loss(model, data) + 0.5 * model[2].weight.square().sum()).backward()
    assert torch.allclose(model[2].weight.grad, bare + model[2].weight, rtol=1e-5, atol=1e-6)
