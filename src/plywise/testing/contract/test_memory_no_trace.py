"""A step that did not happen leaves no trace in the statistics, nor in anything after."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plywise.engine.health import SKIPPED
from plywise.testing.cases import Case
from plywise.testing.contract import test_no_trace as plain
from plywise.testing.contract.memories import Data, Run, keep_buffers, select_layer, start
from plywise.testing.contract.models import compute_loss, have_same_bits, make_batch
from plywise.testing.contract.test_checkpoint import CALLS, Deep

Disturbance = Callable[[Run, Data], None]


def disturb_model(disturb: Callable[[nn.Module, Data], None]) -> Disturbance:
    def disturbance(run: Run, data: Data) -> None:
        disturb(run.model, data)

    disturbance.__name__ = disturb.__name__
    return disturbance


def backward_then_grad_none(run: Run, data: Data) -> None:
    compute_loss(run.model, data).backward()
    for parameter in run.model.parameters():
        parameter.grad = None


def backward_then_the_optimizers_zero_grad(run: Run, data: Data) -> None:
    for set_to_none in (True, False):
        compute_loss(run.model, data).backward()
        run.optimizer.zero_grad(set_to_none)


def some_micro_batches_then_zero_grad(run: Run, data: Data) -> None:
    for _ in range(3):
        compute_loss(run.model, data).backward()
    run.optimizer.zero_grad()


def step_without_backward(run: Run, data: Data) -> None:
    run.optimizer.zero_grad()
    run.optimizer.step()


def step_skipped_for_a_nan(run: Run, data: Data) -> None:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        run.step_on((data[0] * float("nan"), data[1]))
    run.optimizer.zero_grad()


def step_skipped_for_an_infinity_in_one_layer(run: Run, data: Data) -> None:
    run.optimizer.zero_grad()
    compute_loss(run.model, data).backward()
    next(run.model.parameters()).grad.view(-1)[0] = float("inf")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        run.optimizer.step()
    run.optimizer.zero_grad()


def step_that_an_earlier_hook_stops(run: Run, data: Data) -> None:
    run.optimizer.zero_grad()
    compute_loss(run.model, data).backward()
    handle = run.optimizer.register_step_pre_hook(plain.raise_break)
    # as if registered before the rule's: one registered after it comes when the statistics are learned
    run.optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)
    with pytest.raises(plain.BreakError):
        run.optimizer.step()
    handle.remove()
    run.optimizer.zero_grad()


def closure_that_raises(run: Run, data: Data) -> None:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        compute_loss(run.model, data).backward()
        raise plain.BreakError

    with pytest.raises(plain.BreakError):
        run.optimizer.step(closure)
    run.optimizer.zero_grad()


def looking(run: Run, data: Data) -> None:
    run.optimizer.state_dict()
    copy.deepcopy(run.model)
    str(run.rule.explain())


BETWEEN_STEPS: list[Disturbance] = [
    *map(disturb_model, plain.DISTURBANCES),
    backward_then_grad_none,
    backward_then_the_optimizers_zero_grad,
    some_micro_batches_then_zero_grad,
    step_without_backward,
    step_skipped_for_a_nan,
    step_skipped_for_an_infinity_in_one_layer,
    step_that_an_earlier_hook_stops,
    closure_that_raises,
    looking,
]
# these leave the gradients alone
BEFORE_THE_STEP = [
    disturb_model(plain.no_grad),
    disturb_model(plain.eval_forward),
    disturb_model(plain.discarded_graph),
    disturb_model(plain.exception_in_forward),
    disturb_model(plain.gradient_of_the_input_only),
    disturb_model(plain.gradient_without_accumulation),
    looking,
]


def record_history(case: Case, between: Disturbance | None, before_step: Disturbance | None) -> list[dict]:
    """Copy weights and statistics after each of four steps, disturbed or not."""
    run, found = start(case, "mixed"), []
    for number in range(4):
        if between is not None:
            with keep_buffers(run.model):
                between(run, make_batch(run.shape, seed=10 + number))
        run.optimizer.zero_grad()
        run.backward(number)
        if before_step is not None:
            with keep_buffers(run.model):
                before_step(run, make_batch(run.shape, seed=20 + number))
        run.optimizer.step()
        found.append(run.copy_state())
    skips = between in (step_skipped_for_a_nan, step_skipped_for_an_infinity_in_one_layer)
    assert run.rule.health.total(SKIPPED) == (4 if skips else 0)
    return found


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict]]:
    return {}


def check(case: Case, undisturbed: dict[str, list[dict]], found: list[dict]) -> None:
    if case.name not in undisturbed:
        undisturbed[case.name] = record_history(case, None, None)
    for step, (one, other) in enumerate(zip(undisturbed[case.name], found, strict=True)):
        assert have_same_bits(one, other), step


@pytest.mark.one_of_family
@pytest.mark.parametrize("disturb", BETWEEN_STEPS, ids=lambda f: f.__name__)
def test_between_steps(memory_case: Case, undisturbed: dict[str, list[dict]], disturb: Disturbance) -> None:
    check(memory_case, undisturbed, record_history(memory_case, disturb, None))


@pytest.mark.one_of_family
@pytest.mark.parametrize("disturb", BEFORE_THE_STEP, ids=lambda f: f.__name__)
def test_between_backward_and_step(
    memory_case: Case, undisturbed: dict[str, list[dict]], disturb: Disturbance
) -> None:
    check(memory_case, undisturbed, record_history(memory_case, None, disturb))


@pytest.mark.parametrize("kind", ["mlp", "mixed"])
def test_every_step_that_happened_is_remembered(memory_case: Case, kind: str) -> None:
    # the measure of this file can see something: every layer, in every step that gathers
    run = start(memory_case, kind)
    handled = [row.name for row in run.rule.explain().rows if row.handled]
    for number in range(6):
        before = run.copy_memory()
        run.step(number)
        after = run.copy_memory()
        for layer in handled:
            assert select_layer(after, layer), layer
        assert all(torch.isfinite(value).all() for value in after.values())
        if number % run.rule.stats_every == 0:
            assert not have_same_bits(before, after)
    assert not run.rule.health.counts


@pytest.fixture(scope="module")
def without_recomputation() -> dict[str, dict[str, Tensor]]:
    """The ends of plain runs by rule, made once each."""
    return {}


@pytest.mark.parametrize("how", [None, *CALLS])
def test_recomputation_counts_once(
    memory_case: Case, how: str | None, without_recomputation: dict[str, dict[str, Tensor]]
) -> None:
    def trained(call: str | None) -> dict[str, Tensor]:
        run = Run.begin(memory_case.make(), Deep(CALLS[call] if call else None))
        for number in range(4):
            torch.manual_seed(number)
            run.step_on(make_batch(seed=number))
        return run.copy_state()

    if memory_case.name not in without_recomputation:
        without_recomputation[memory_case.name] = trained(None)
    assert have_same_bits(trained(how), without_recomputation[memory_case.name])


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_that_skips(memory_case: Case, fused: bool) -> None:
    results = []
    for overflows in ((), (0, 2)):
        run = start(memory_case)
        run.restart(torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9, fused=fused))
        # a backoff of one: L remembers the loss scale
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=1.0 - 1e-12)
        for number in range(4):
            for factor in (float("inf"), 1.0) if number in overflows else (1.0,):
                run.optimizer.zero_grad()
                scaler.scale(compute_loss(run.model, run.make_data(number)) * factor).backward()
                with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of the guard
                    scaler.step(run.optimizer)
                scaler.update()
            results.append(run.copy_state())
    for one, other in zip(results[:4], results[4:], strict=True):
        assert have_same_bits(one, other)


def test_gradients_thrown_away_between_micro_batches(memory_case: Case) -> None:
    # only what is in .grad at the step counts
    results = []
    for disturbed in (False, True):
        run = start(memory_case, steps=3)
        run.optimizer.zero_grad()
        for set_to_none in (True, False) if disturbed else ():
            run.backward(90)
            run.model.zero_grad(set_to_none)
        run.backward(3)
        run.optimizer.step()
        results.append(run.copy_state())
    assert have_same_bits(*results)
