"""Micro-batches add up; the loss's scale goes through; GradScaler."""

import warnings

import pytest
import torch
from torch import nn

from plywise import Rule
from plywise.engine.health import SKIPPED
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    MODELS,
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

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
    "sgd-fused": lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.003),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.003, fused=True),
}


def attach_warm(case: Case, model: nn.Module, shape: tuple[int, ...]) -> Rule:
    # with the optimizer a cap waits for the step: .grad is what backward made
    return attach(case.make(), model, torch.optim.SGD(model.parameters(), lr=0.1), warm=shape)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.one_of_family)]
)
@pytest.mark.parametrize("kind", list(MODELS))
def test_micro_batches_add_up(case: Case, kind: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[kind]
    parts = [
        make_batch(shape, n, dtype, seed) for n, seed in ((12, 2), (5, 3), (1 if kind == "mlp" else 2, 4))
    ]
    model = build(dtype)
    rule = attach_warm(case, model, shape)
    apart = [compute_gradients(model, part) for part in parts]
    model.zero_grad()
    for part in parts:
        compute_loss(model, part).backward()
    expected = {name: apart[0][name] + apart[1][name] + apart[2][name] for name in apart[0]}
    assert have_same_bits(copy_gradients(model), expected)
    rule.detach()


@pytest.mark.parametrize("kind", list(MODELS))
def test_moves_are_proportional_to_the_loss(case: Case, kind: str) -> None:
    if case.not_homogeneous:
        pytest.skip(case.not_homogeneous)
    build, shape = MODELS[kind]
    model = build(torch.float64)
    rule = attach_warm(case, model, shape)
    once = compute_gradients(model, make_batch(shape, dtype=torch.float64))
    for scale in (1024.0, 2.0**-10, -1.0, 0.0):
        scaled = compute_gradients(model, make_batch(shape, dtype=torch.float64), scale)
        assert have_same_bits(scaled, {name: g * scale for name, g in once.items()}), scale
    rule.detach()


@pytest.mark.parametrize(
    "optimizer_name",
    [pytest.param(name, marks=[pytest.mark.one_of_family] * name.endswith("fused")) for name in OPTIMIZERS],
)
def test_grad_scaler_changes_nothing(case: Case, optimizer_name: str) -> None:
    if case.not_homogeneous:
        pytest.skip(case.not_homogeneous)
    data, results = make_batch(), []
    for scaled in (False, True):
        model = make_mlp()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        rule = case.make().attach(model, optimizer)
        if scaled:
            growth = 100 if case.remembers_scales else 2
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=growth)
            for _ in range(4):
                optimizer.zero_grad()
                scaler.scale(compute_loss(model, data)).backward()
                scaler.step(optimizer)
                scaler.update()
            assert case.remembers_scales or scaler.get_scale() > 2.0**16
        else:
            train(model, optimizer, data, 4)
        results.append(copy_weights(model))
        rule.detach()
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.one_of_family
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_grad_scaler_skips_an_overflow(case: Case, optimizer_name: str) -> None:
    data, model = make_batch(), make_mlp()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    rule = case.make().attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(compute_loss(model, data) * factor).backward()
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # fused: of the guard
            scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before = copy_weights(model)
    step(float("inf"))
    assert have_same_bits(copy_weights(model), before)
    assert scaler.get_scale() == 512.0
    step(1.0)
    assert are_finite(copy_weights(model))
    assert not have_same_bits(copy_weights(model), before)
    rule.detach()


def test_unscale_then_clip(case: Case) -> None:
    if case.not_homogeneous:
        pytest.skip(case.not_homogeneous)
    model, data = make_mlp(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = attach(case.make(), model, optimizer, warm=(6,))
    plain = compute_gradients(model, data)
    norm = torch.nn.utils.get_total_norm(plain.values())
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaler.scale(compute_loss(model, data)).backward()
    scaler.unscale_(optimizer)
    assert_close(copy_gradients(model), plain, 1e-6)
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 4)
    assert torch.allclose(found, norm, rtol=1e-5)
    assert_close(copy_gradients(model), {name: g / 4 for name, g in plain.items()}, 1e-4)
    scaler.step(optimizer)
    assert rule.health.total(SKIPPED) == 0
    rule.detach()
