"""Micro-batches, reused layers, dtypes and loss scales: the statistics are those of the whole batch."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise.engine.health import NON_FINITE
from plywise.testing.cases import Case
from plywise.testing.contract.memories import (
    Run,
    select_layer,
    select_statistics,
    select_tensors,
    start,
)
from plywise.testing.contract.models import (
    Net,
    are_finite,
    assert_close,
    compute_loss,
    copy_weights,
    count_fallbacks,
    have_same_bits,
    make_batch,
)
from plywise.testing.contract.structures import make_gated

STEPS = 5


def leave_out(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name not in names}


def assert_close_states(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare states; eigenvectors, which may be as far apart as eigenvalues are close, less strictly."""
    vectors = {key for key in expected if key.endswith((".vectors", ".basis"))}
    assert_close(leave_out(found, vectors), leave_out(expected, vectors), tolerance)
    assert_close(found, expected, 1e-8)


def run_in_parts(run: Run, sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Train with each batch cut into parts of these sizes, and copy the state after each step."""
    run.model.eval()  # batch norm sees what is in a part
    found = []
    for number in range(STEPS):
        x, y = run.make_data(number)
        run.optimizer.zero_grad()
        for part, labels in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
            (compute_loss(run.model, (part, labels)) * len(part) / len(x)).backward()
        run.optimizer.step()
        found.append(run.copy_state())
    return found


Record = Callable[[Case, str], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def run_whole() -> Record:
    """Trains on whole batches in float64; once for all tests."""
    return cache(lambda case, kind: run_in_parts(start(case, kind, dtype=torch.float64), (4,)))


@pytest.mark.one_of_family
@pytest.mark.parametrize("kind", ["mlp", "mixed"])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (3, 1)], ids=str)
def test_micro_batches_are_one_batch(
    memory_case: Case, kind: str, sizes: tuple[int, ...], run_whole: Record
) -> None:
    parts = run_in_parts(start(memory_case, kind, dtype=torch.float64), sizes)
    for one, other in zip(parts, run_whole(memory_case, kind), strict=True):
        assert_close_states(one, other, 1e-12)


def test_an_empty_micro_batch_says_nothing(memory_case: Case) -> None:
    whole = run_in_parts(start(memory_case), (4,))
    parts = run_in_parts(start(memory_case), (4, 0))
    for one, other in zip(parts, whole, strict=True):
        assert have_same_bits(one, other)


def test_a_layer_used_several_times_is_one_layer(memory_case: Case) -> None:
    results = []
    for calls in (1, 2):  # of the layer, on parts of the batch

        def call(net: nn.Module, x: Tensor, calls: int = calls) -> Tensor:
            return net.head(torch.cat([torch.tanh(net.layer(part)) for part in x.split(len(x) // calls)]))

        torch.manual_seed(1)
        model = Net(call, layer=nn.Linear(6, 8), head=nn.Linear(8, 3)).double()
        results.append(Run.begin(memory_case.make(), model).record(range(STEPS))[-1])
    assert_close_states(results[1], results[0], 1e-10)


# ---- dtypes -----------------------------------------------------------------------------------------


def list_dtypes(memories: dict[str, Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in select_tensors(memories).values()}


@pytest.mark.parametrize("kind", ["mlp", "mixed"])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_statistics_are_float32_at_least(
    memory_case: Case, kind: str, dtype: torch.dtype, kept: torch.dtype
) -> None:
    run = start(memory_case, kind, dtype=dtype, steps=4)
    found = run.copy_memory()
    assert list_dtypes(found) == {kept}
    assert are_finite(found)
    assert all(value.dtype == dtype for name, value in copy_weights(run.model).items() if "num_" not in name)
    assert count_fallbacks(run.rule) == 0


@pytest.fixture(scope="module")
def train_undisturbed() -> Record:
    """Trains for some steps; once for all tests."""
    return cache(lambda case, kind: start(case, kind).record(range(7)))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "kept", "tolerance"),
    [(torch.float64, torch.float64, 1e-3), (torch.bfloat16, torch.float32, 0.1)],
    ids=str,
)
def test_the_model_moves_between_steps(
    memory_case: Case,
    at: int,
    dtype: torch.dtype,
    kept: torch.dtype,
    tolerance: float,
    train_undisturbed: Record,
) -> None:
    moved = start(memory_case, steps=at)
    moved.model.to(dtype)
    for number in range(at, at + 4):
        moved.step(number)
    found = moved.copy_memory()
    assert list_dtypes(found) == {kept}
    assert count_fallbacks(moved.rule) == 0
    undisturbed = train_undisturbed(memory_case, "mlp")[at + 3]
    for name in copy_weights(moved.model):
        value = undisturbed[name]
        difference = (copy_weights(moved.model)[name].float() - value).abs().max()
        assert difference <= tolerance * value.abs().max(), name


def step_under_autocast(run: Run, number: int, around: str) -> None:
    """Take a step with autocast around its forward, around its backward too, or around all of it."""
    run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(run.model, run.make_data(number))
        if around != "forward":
            loss.backward()
        if around == "all":
            run.optimizer.step()
    if around == "forward":
        loss.backward()
    if around != "all":
        run.optimizer.step()


@pytest.mark.one_of_family
@pytest.mark.parametrize("kind", ["mlp", "mixed"])
@pytest.mark.parametrize("around", ["forward", "backward", "all"])
def test_autocast(memory_case: Case, kind: str, around: str, train_undisturbed: Record) -> None:
    run = start(memory_case, kind)
    for number in range(4):
        step_under_autocast(run, number, around)
    found = run.copy_memory()
    assert list_dtypes(found) == {torch.float32}
    assert are_finite(found)
    assert count_fallbacks(run.rule) == 0
    undisturbed = train_undisturbed(memory_case, kind)[3]
    for name, found_weight in copy_weights(run.model).items():
        value = undisturbed[name]
        if value.is_floating_point():
            assert (found_weight - value).abs().max() <= 0.15 * value.abs().max(), name


@pytest.mark.parametrize("around", ["backward", "all"])
def test_autocast_leaves_the_rules_own_work_alone(memory_case: Case, around: str) -> None:
    # half precision is meant for the network: a Gram or a root made with it would be no statistic
    results = []
    for where in ("forward", around):
        run = start(memory_case)
        for number in range(4):
            step_under_autocast(run, number, where)
        results.append(run.copy_state())
    assert have_same_bits(*results)


@pytest.mark.parametrize("kind", ["mlp", "mixed"])
def test_a_constant_loss_scale_changes_no_direction(memory_case: Case, kind: str) -> None:
    results = []
    for scaled in (False, True):
        run = start(memory_case, kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000, enabled=scaled)
        for number in range(STEPS):
            run.optimizer.zero_grad()
            scaler.scale(compute_loss(run.model, run.make_data(number))).backward()
            if number % 2:
                scaler.unscale_(run.optimizer)
                nn.utils.clip_grad_norm_(run.model.parameters(), 100.0)
            scaler.step(run.optimizer)
            scaler.update()
        results.append(copy_weights(run.model))
    assert_close(results[1], results[0], 1e-4)


# ---- evidence that is no use ------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 2, 4])
def test_squares_that_overflow_are_not_learned(memory_case: Case, warm: int) -> None:
    # the gradient is finite, so the step is taken; the squares of the inputs are not
    if not memory_case.remembers_rows:
        pytest.skip("it remembers no squares")
    run = start(memory_case, steps=warm)
    x, _ = run.make_data(9)
    x[0, 0] = 1e25
    before = run.copy_memory()
    longest = run.rule.stats_every * run.rule.slowdown  # between two gatherings
    for _ in range(longest):
        run.optimizer.zero_grad()
        # a function of layer 0 that such an output does not spoil
        torch.tanh(run.model[0](x) * 1e-25).sum().mul(1e-20).backward()
        assert are_finite({str(i): p.grad for i, p in enumerate(run.model[0].parameters())})
        run.optimizer.step()
        assert have_same_bits(select_statistics(run.copy_memory(), "0"), select_statistics(before, "0"))
        if run.rule.health.counts:  # it was a step that gathers
            break
    assert run.rule.health.of("0") == {NON_FINITE: 1}
    assert are_finite(copy_weights(run.model))
    for number in range(max(longest, 4)):  # and goes on
        run.step(number)
        assert are_finite(run.copy_state())
    assert not have_same_bits(select_statistics(run.copy_memory(), "0"), select_statistics(before, "0"))


def test_a_layer_that_rests(memory_case: Case) -> None:
    run = Run.begin(memory_case.make(), make_gated())
    used: set[str] = set()
    for number, which in enumerate(["a", "b", "ab", "b", "a", "a", "ab", "b", "b", "ab"]):
        before = run.copy_memory()
        run.optimizer.zero_grad(set_to_none=number % 3 > 0)
        x, y = make_batch(seed=number)
        F.cross_entropy(run.model(x, which), y).backward()
        run.optimizer.step()
        after = run.copy_memory()
        used |= {*which}
        for layer in "ab":
            mine, its = select_layer(before, layer), select_layer(after, layer)
            assert layer in which or have_same_bits(mine, its), (number, layer)
            assert bool(its) == (layer in used)
        assert are_finite(after)
    assert not run.rule.health.counts


LOSSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "no rows": lambda model, x: model(x[:0]).sum(),
    "zero loss": lambda model, x: model(x).sum() * 0,
}


@pytest.mark.parametrize("what", list(LOSSES))
def test_nothing_to_learn_from(memory_case: Case, what: str) -> None:
    run = start(memory_case, steps=3)
    for number in range(3):
        run.optimizer.zero_grad()
        LOSSES[what](run.model, run.make_data(number)[0]).backward()
        run.optimizer.step()
        assert are_finite(run.copy_state())
    run.step(4)
    assert are_finite(run.copy_state())
    assert not run.rule.health.counts
