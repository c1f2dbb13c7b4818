"""Closures, hooks, groups and optimizers of all kinds; detached or dropped, nothing is left."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from plywise import AttachError, PlywiseError, Rule
from plywise.engine.health import SKIPPED
from plywise.testing.cases import Case
from plywise.testing.contract.memories import PREFIX, ROWS, Run, copy_memory, list_layers, select_layer, start
from plywise.testing.contract.models import (
    are_finite,
    compute_gradients,
    compute_loss,
    copy_gradients,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
    step_by_closure,
)
from plywise.testing.contract.test_unmodified import list_hooks


def test_memory_needs_the_optimizer(memory_case: Case) -> None:
    model, rule = make_mlp(), memory_case.make()
    name = type(rule).__name__
    with pytest.raises(AttachError, match=rf"{name} keeps a running statistic.*attach\(model, optimizer\)"):
        rule.attach(model)
    assert list_hooks(model) == []
    rule.attach(model, SGD(model.parameters(), lr=0.1))


def test_the_first_backward_is_backpropagation(memory_case: Case) -> None:
    run = start(memory_case, "mixed")
    plain = start(Case("plain", _Nothing), "mixed")
    found, expected = (compute_gradients(one.model, one.make_data(0)) for one in (run, plain))
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


class _Nothing:
    """Stands for a rule where there is none."""

    def attach(self, model: nn.Module, optimizer: Optimizer) -> "_Nothing":
        return self


@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_backward_and_step(memory_case: Case, make: type[Optimizer], by_keyword: bool) -> None:
    ends = []
    for closed in (False, True):
        run = use_optimizer(start(memory_case), lambda p: make(p, lr=0.02))
        for number in range(4):
            if closed:
                step_by_closure(run.model, run.optimizer, run.make_data(number), by_keyword)
            else:
                run.step(number)
        ends.append(run.copy_state())
    assert have_same_bits(*ends)


def use_optimizer(run: Run, make: Callable[[Any], Optimizer]) -> Run:
    """Begin the same run again with another optimizer."""
    run.restart(make(run.model.parameters()))
    return run


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(memory_case: Case, search: str | None) -> None:
    # it evaluates its closure many times a step: the last evaluation is what the step learns
    if memory_case.make().turns_steps:
        pytest.skip("refused by name: see tests/rules/test_coordinates.py")
    run = use_optimizer(start(memory_case), lambda p: LBFGS(p, lr=0.1, max_iter=3, line_search_fn=search))
    before = compute_loss(run.model, run.make_data(0)).item()
    for _ in range(4):
        step_by_closure(run.model, run.optimizer, run.make_data(0))
        assert are_finite(run.copy_state())
    assert compute_loss(run.model, run.make_data(0)).item() < before
    assert not run.rule.health.counts


def test_a_users_hook_before_ours_changes_what_we_get(memory_case: Case) -> None:
    # as a clipping by hand, between backward and step
    def halve(*_: Any) -> None:
        for parameter in run.model.parameters():
            parameter.grad.mul_(0.5)

    ends = []
    for hooked in (False, True):
        run = start(memory_case)
        if hooked:
            handle = run.optimizer.register_step_pre_hook(halve)
            run.optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)
        for number in range(4):
            run.optimizer.zero_grad()
            run.backward(number)
            if not hooked:
                halve()
            run.optimizer.step()
        ends.append(run.copy_state())
    assert have_same_bits(*ends)


def test_a_users_hook_after_ours_sees_the_move(memory_case: Case) -> None:
    run, seen = start(memory_case), {}
    if run.rule.turns_steps:
        pytest.skip("the gradient is one in other coordinates, and so is the optimizer's own step")
    run = use_optimizer(run, lambda p: SGD(p, lr=0.5))
    run.optimizer.register_step_pre_hook(lambda *_: seen.update(copy_gradients(run.model)))
    for number in range(4):
        before = copy_weights(run.model)
        run.step(number)
        for name, value in copy_weights(run.model).items():
            assert torch.allclose(value, before[name] - 0.5 * seen[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("kind", ["foreach", "fused", "adamw-fused"])
def test_every_implementation_of_an_optimizer(memory_case: Case, kind: str) -> None:
    plain: dict[str, Callable[[Any], Optimizer]] = {
        "foreach": lambda p: SGD(p, lr=0.05, momentum=0.9, foreach=True),
        "fused": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
        "adamw-fused": lambda p: AdamW(p, lr=0.01, fused=True),
    }
    make = {"adamw-fused": lambda p: AdamW(p, lr=0.01)}.get(kind, lambda p: SGD(p, lr=0.05, momentum=0.9))
    ends = []
    for one in (plain[kind], make):
        run = use_optimizer(start(memory_case), one)
        run.record(range(4))
        ends.append(copy_weights(run.model))
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-3, atol=1e-4), name


def test_groups_and_a_scheduler(memory_case: Case) -> None:
    # two groups with one rate are one group; a schedule changes no statistic of the step it comes after
    ends = []
    for split in (False, True):
        run = start(memory_case)
        parameters = list(run.model.parameters())
        groups = [{"params": parameters[:3]}, {"params": parameters[3:]}] if split else parameters
        run.restart(SGD(groups, lr=0.1, momentum=0.9))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=6)
        for number in range(5):
            run.step(number)
            scheduler.step()
        ends.append(run.copy_state())
    assert have_same_bits(*ends)


def test_an_optimizer_of_some_layers(memory_case: Case) -> None:
    # the others keep their gradient, for the optimizer that steps them; once they join, they are learned too
    run = start(memory_case)
    run.restart(SGD(run.model[2:].parameters(), lr=0.05))
    plain = make_mlp()
    if run.rule.alters_backward:
        with pytest.raises(PlywiseError, match=r"'0.* would get a wrong gradient"):
            run.backward(0)
        return
    for number in range(4):
        plain.load_state_dict(run.model.state_dict())
        run.optimizer.zero_grad()
        run.model.zero_grad()
        run.backward(number)
        expected = compute_gradients(plain, run.make_data(number))["0.weight"]
        run.optimizer.step()
        assert torch.allclose(run.model[0].weight.grad, expected, rtol=1e-5, atol=1e-6)
        assert not select_layer(run.copy_memory(), "0")
        assert select_layer(run.copy_memory(), "2")
        assert are_finite(run.copy_state())
    before = copy_weights(run.model)
    run.optimizer.add_param_group({"params": run.model[0].parameters(), "lr": 0.01})
    for number in range(4, 8):
        run.step(number)
        assert are_finite(run.copy_state())
    assert select_layer(run.copy_memory(), "0")
    assert not torch.equal(run.model[0].weight, before["0.weight"])
    assert not run.rule.health.counts


def test_two_optimizers_with_a_rule_each(memory_case: Case) -> None:
    # as one optimizer with a rule on all
    together = start(memory_case)
    apart = start(memory_case)
    apart.rule.detach()
    lower = SGD(apart.model[:2].parameters(), lr=0.05, momentum=0.9)
    upper = SGD(apart.model[2:].parameters(), lr=0.05, momentum=0.9)
    rules = [memory_case.make(), memory_case.make()]
    rules[0].attach(apart.model, lower, layers="0")
    rules[1].attach(apart.model, upper, exclude="0")
    for number in range(3):
        together.step(number)
        apart.model.zero_grad()
        apart.backward(number)
        lower.step()
        upper.step()
        assert are_finite(copy_weights(apart.model))
        assert all(are_finite(copy_memory(apart.model, one)) for one in (lower, upper))
    if together.rule.refresh_every == 1:  # else layers take turns, and the turn depends on the others
        assert have_same_bits(copy_weights(apart.model), copy_weights(together.model))
    assert list_layers(copy_memory(apart.model, lower)) == {"0"}
    assert list_layers(copy_memory(apart.model, upper)) == {"2", "4"}


def test_a_layer_may_be_stepped_without_the_rules_others(memory_case: Case) -> None:
    # gradients of some layers are thrown away by hand: they do not learn in that step
    run = start(memory_case, steps=3)
    for number in range(3, 7):
        before = run.copy_memory()
        run.optimizer.zero_grad()
        run.backward(number)
        for parameter in run.model[2].parameters():
            parameter.grad = None
        held = copy_weights(run.model)["2.weight"]
        run.optimizer.step()
        assert have_same_bits(select_layer(run.copy_memory(), "2"), select_layer(before, "2"))
        assert torch.equal(run.model[2].weight, held)


# ---- nothing is left --------------------------------------------------------------------------------


def test_detach_leaves_nothing_on_the_optimizer(memory_case: Case) -> None:
    run = start(memory_case, steps=3)
    assert "plywise" in run.optimizer.state_dict()
    assert len(list_hooks(run.model, run.optimizer)) > 4
    kept = [StorageWeakRef(value.untyped_storage()) for value in list_tensors(run.optimizer)]
    assert kept
    run.rule.detach()
    assert list_hooks(run.model, run.optimizer) == []
    assert "plywise" not in run.optimizer.state_dict()
    gc.collect()
    assert all(ref.expired() for ref in kept)
    # and the state of an optimizer without us loads
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.step(3)
    # attached again, it starts again, and says so: what was loaded might have had statistics
    with pytest.warns(RuntimeWarning, match="they begin from nothing"):
        run.rule.attach(run.model, run.optimizer)
    assert not run.copy_memory()


def list_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List the rule's tensors themselves, not copies."""
    owned = [item for state in optimizer.state.values() for item in state.items()]
    return [value for key, value in owned if str(key).startswith(PREFIX) and isinstance(value, Tensor)]


@pytest.mark.parametrize("pending", [False, True])
def test_dropping_model_and_optimizer_frees_the_memory(memory_case: Case, pending: bool) -> None:
    run = start(memory_case, "mixed", steps=3)
    if pending:
        run.backward(3)
    kept = [StorageWeakRef(value.untyped_storage()) for value in list_tensors(run.optimizer)]
    gone = [weakref.ref(module) for module in run.model.modules()]
    rule: Rule = run.rule
    del run
    gc.collect()
    assert all(ref() is None for ref in gone)
    with pytest.raises(AttachError, match="gone"):
        rule.explain()
    rule.detach()
    gc.collect()
    assert all(ref.expired() for ref in kept)


def test_evidence_holds_no_activations(memory_case: Case) -> None:
    run = start(memory_case, steps=3)
    run.optimizer.zero_grad()
    x = torch.randn(ROWS, 6)
    storage = StorageWeakRef(x.untyped_storage())
    gc.collect()
    gc.disable()
    try:
        run.model(x).sum().backward()
        del x
        assert storage.expired()
    finally:
        gc.enable()


def test_a_step_that_raises_keeps_the_old_memory(memory_case: Case) -> None:
    # non-finite gradients under on_nonfinite="raise"
    run = start(memory_case, steps=3)
    state = run.optimizer.state_dict()
    run.restart(on_nonfinite="raise")
    run.optimizer.load_state_dict(state)
    before = run.copy_state()
    run.optimizer.zero_grad()
    run.backward(3)
    run.model[2].weight.grad[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        run.optimizer.step()
    assert have_same_bits(run.copy_state(), before)
    assert run.rule.health.total(SKIPPED) == 0
    run.step(3)
    other = start(memory_case, steps=4)
    assert have_same_bits(run.copy_state(), other.copy_state())


def test_propagated_gradients_never_enter_the_memory(memory_case: Case) -> None:
    run = start(memory_case, steps=3)
    state = run.optimizer.state_dict()
    run.restart(on_nonfinite="propagate")
    run.optimizer.load_state_dict(state)
    x, y = make_batch((6,), ROWS)
    run.step_on((x * float("nan"), y))
    assert are_finite(run.copy_memory())
    assert not are_finite(copy_weights(run.model))
