"""What `rule.record` measures, against the same numbers made by hand; and that it changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.engine.reports.history import NUMBERS
from plywise.testing.contract.models import (
    compute_loss,
    copy_weights,
    have_same_bits,
    make_batch,
    make_convnet,
    make_mlp,
    train,
)

RATE = 0.1


def degrees(one, other):
    cosine = torch.dot(one.flatten(), other.flatten()) / (one.norm() * other.norm())
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))


def plain_gradients(model, data):
    other = copy.deepcopy(model)
    compute_loss(other, data).backward()
    return {name: p.grad for name, p in other.named_parameters()}


def start(rule, model, optimizer=torch.optim.SGD, **settings):
    made = optimizer(model.parameters(), **{"lr": RATE, **settings})
    return rule.attach(model, made), made


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (pw.Backprop(), 1),
        (pw.ProxProp(), 3),
        (pw.NLMS(), 3),
        (pw.Foof(damping=0.1, stats_every=2, refresh_every=2), 1),  # the step makes the update
        (pw.Foof(damping=0.1, stats_every=2, refresh_every=2), 4),  # a step of a layer at rest
        (pw.KFAC(stats_every=1, refresh_every=2), 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_numbers_are_those_made_by_hand(rule, steps, kind):
    build, shape = (make_mlp, (6,)) if kind == "mlp" else (make_convnet, (2, 6, 6))
    model = build(torch.float64)
    rule, optimizer = start(copy.copy(rule), model)
    history = rule.record(every=1)
    for number in range(steps):
        data = make_batch(shape, dtype=torch.float64, seed=number)
        plain, before = plain_gradients(model, data), copy_weights(model)
        train(model, optimizer, data, 1)
    assert [one.step for one in history] == list(range(1, steps + 1))
    layers = history[-1].layers
    assert {"0", "4"} <= set(layers)
    for name, layer in layers.items():
        weight = dict(model.named_parameters())[f"{name}.weight"]
        moved, gradient = before[f"{name}.weight"] - weight.detach(), plain[f"{name}.weight"]
        assert layer.effective_rate == pytest.approx(float(moved.norm() / gradient.norm()), rel=1e-6)
        assert layer.update_over_weight == pytest.approx(
            float(moved.norm() / before[f"{name}.weight"].norm()), rel=1e-6
        )
        assert layer.angle == pytest.approx(degrees(weight.grad, gradient), abs=1e-4)
        assert layer.step_angle == pytest.approx(degrees(moved, gradient), abs=1e-4)
    if type(rule) is pw.Backprop:
        assert all(layer.effective_rate == pytest.approx(RATE) for layer in layers.values())


def test_micro_batches_count_as_one_step():
    whole, parts = make_mlp(torch.float64), make_mlp(torch.float64)
    data = make_batch(dtype=torch.float64)
    found = []
    for model, sizes in ((whole, [12]), (parts, [8, 4])):
        rule, optimizer = start(pw.Backprop(), model)
        rule.record(every=1)
        compute_loss(model, make_batch(dtype=torch.float64, seed=9)).backward()
        optimizer.zero_grad()  # a backward that is thrown away
        for x, y in zip(data[0].split(sizes), data[1].split(sizes), strict=True):
            (compute_loss(model, (x, y)) * len(x) / 12).backward()
        optimizer.step()
        found.append(rule.history[-1].layers)
    for name, layer in found[0].items():
        for number in NUMBERS:
            assert getattr(found[1][name], number) == pytest.approx(getattr(layer, number), abs=1e-5)


@pytest.mark.parametrize(
    "make", [pw.ProxProp, lambda: pw.Foof(stats_every=2, refresh_every=2), pw.Coordinates]
)
@pytest.mark.parametrize("every", [1, 3])
def test_recording_changes_nothing(make, every):
    ends = []
    for records in (False, True):
        model = make_convnet()
        rule, optimizer = start(make(), model, torch.optim.AdamW, lr=0.01)
        if records:
            rule.record(every=every)
        for number in range(7):
            train(model, optimizer, make_batch((2, 6, 6), seed=number), 1)
        ends.append(copy_weights(model))
        if records:
            assert [one.step for one in rule.history] == ([1, 2, 3, 4, 5, 6, 7] if every == 1 else [1, 4, 7])
    assert have_same_bits(*ends)


def test_coordinates_have_no_angle_of_their_own():
    model = make_mlp()
    rule, optimizer = start(pw.Coordinates(), model, torch.optim.AdamW, lr=0.01)
    rule.record(every=1)
    train(model, optimizer, make_batch(), 2)
    for layer in rule.history[-1].layers.values():
        assert layer.angle is None
        assert 0 < layer.step_angle < 90


def test_the_residual_is_that_of_the_definition():
    model = make_mlp(torch.float64)
    rule = pw.Precondition(right=0.5, damping=0.1, relative_to="mean", stats_every=1, refresh_every=3)
    rule, optimizer = start(rule, model)
    rule.record(every=1)
    for number in range(5):  # layers refresh in turns: some act by an older root
        train(model, optimizer, make_batch(dtype=torch.float64, seed=number), 1)
    states, old = rule.statistics, 0
    for name, layer in rule.history[-1].layers.items():
        state = states[name]
        statistic = (state["input"] / state["input.count"])[0]
        statistic = statistic.tril() + statistic.tril(-1).T
        damped = statistic + 0.1 * statistic.diagonal().mean() * torch.eye(
            len(statistic), dtype=torch.float64
        )
        v = torch.arange(len(damped), dtype=torch.float64).cos()
        root = state["input.root"][0]
        expected = (root @ root @ damped @ v - v).norm() / v.norm()
        assert layer.refresh_residual == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
        old += layer.refresh_residual > 1e-6
    assert old


def test_the_residual_right_after_a_refresh_is_rounding():
    model = make_mlp(torch.float64)
    rule, optimizer = start(pw.Foof(rank=None, stats_every=1, refresh_every=1), model)
    rule.record(every=1)
    train(model, optimizer, make_batch(dtype=torch.float64), 1)
    assert all(layer.refresh_residual < 1e-6 for layer in rule.history[-1].layers.values())


def test_fallbacks_are_counted_once():
    model = make_mlp()
    rule, optimizer = start(pw.ProxProp(tau=1e20), model)
    rule.record(every=1)
    train(model, optimizer, make_batch(n=40), 3)
    counted = sum(sum(layer.fallbacks.values()) for step in rule.history for layer in step.layers.values())
    assert counted == sum(rule.health.counts.values())
    assert counted > 0


def test_a_skipped_step_is_none():
    model = make_mlp()
    rule, optimizer = start(pw.ProxProp(), model)
    rule.record(every=1)
    x, y = make_batch()
    train(model, optimizer, (x, y), 1)
    with pytest.warns(RuntimeWarning, match="not finite"):
        train(model, optimizer, (x * math.nan, y), 1)
    train(model, optimizer, (x, y), 1)
    assert len(rule.history) == 2
    assert all(math.isfinite(value) for step in rule.history for value in step.scalars().values())


def test_callbacks_hear_and_stop_ends_it():
    model, received = make_mlp(), []
    rule, optimizer = start(pw.ProxProp(), model)
    history = rule.record(every=2, callbacks=[received.append], keep=2)
    train(model, optimizer, make_batch(), 6)
    assert [one.step for one in received] == [1, 3, 5]
    assert [one.step for one in history] == [3, 5]
    history.stop()
    train(model, optimizer, make_batch(), 2)
    assert len(received) == 3
    rule.detach()
    assert rule.history is history


def test_how_the_history_reads():
    model = make_mlp()
    rule, optimizer = start(pw.Foof(), model)
    assert str(rule.history) == "No step has been measured yet."
    rule.record(every=1)
    train(model, optimizer, make_batch(), 3)
    steps, values = rule.history.read("0", "update_over_weight")
    assert steps == [1, 2, 3]
    assert values == [one.layers["0"].update_over_weight for one in rule.history]
    assert "effective rate" in str(rule.history)
    assert "<td>0</td>" in rule.history._repr_html_()
    assert [row["step"] for row in rule.history.rows()] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    scalars = rule.history[-1].scalars()
    assert scalars["plywise/2/angle"] == rule.history[-1].layers["2"].angle
    with pytest.raises(pw.PlywiseError, match="no number 'rate'"):
        rule.history.read("0", "rate")


def test_what_cannot_be_recorded():
    with pytest.raises(pw.AttachError, match="is not attached"):
        pw.ProxProp().record()
    rule = pw.ProxProp().attach(make_mlp())
    with pytest.raises(pw.AttachError, match="without an optimizer"):
        rule.record()
    rule, _ = start(pw.ProxProp(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="every must be a whole number above 0"):
        rule.record(every=0)
