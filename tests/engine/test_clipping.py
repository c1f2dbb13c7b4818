"""The cap on accumulated gradients: equal on all processes, decided on the device."""

import sys
from typing import Any

import pytest
import torch
from clipping_worker import CAP, RATE, main
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import plywise as pw
from plywise.engine.sharding import is_any_nonzero
from processes import run_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rate", "exact"])
def test_a_layer_that_one_process_never_calls_is_clipped_on_all(tmp_path, mode):
    one, two = run_two_ranks(main, tmp_path, mode)
    for name, weight in one["after"].items():
        assert torch.equal(weight, two["after"][name])
        before = one["before"][name]
        if before.dim() > 1:
            moved = torch.linalg.vector_norm(weight - before)
            assert moved.item() == pytest.approx(RATE * CAP * before.norm().item(), rel=1e-5)


def count_synchronisations(run: Any) -> int:
    """How often numbers are read off tensors, one by one or as a list."""
    lists = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal lists
        is_tensor = isinstance(getattr(argument, "__self__", None), Tensor)
        lists += event == "c_call" and is_tensor and argument.__name__ == "tolist"

    with profile(activities=[ProfilerActivity.CPU]) as found:
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
    return lists + sum(e.count for e in found.key_averages() if e.key == "aten::_local_scalar_dense")


@pytest.mark.parametrize("rule", [pw.BackMatching(cap=0.01), pw.BackMatching(cap=None), pw.ProxProp()])
def test_a_step_waits_for_the_device_once(rule):
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rule.attach(model, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 8)).square().mean()
        loss.backward()
        count = count_synchronisations(optimizer.step)
        assert count == 1 or step == 0  # the first one measures
    rule.detach()


def test_a_rule_of_the_older_contract_is_refused_by_name():
    with pytest.raises(TypeError, match=r"clip_update\(weight_norm, update_norm\)"):
        type("Mine", (pw.ProxProp,), {"shrink": lambda self, weight, update: 1.0})


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.0], False), ([1.0, -1.0], True), ([0.0, 3.0], True), ([float("nan"), 0.0], True)],
)
def test_whether_any_number_is_not_zero(values, expected):
    """Also where they cancel in the sum."""
    assert is_any_nonzero([torch.zeros(3), torch.tensor(values)]) is expected


def test_a_step_counts_where_the_gradients_cancel_in_each_sum():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = pw.BackMatching(cap=None).attach(model, optimizer)
    model(torch.tensor([[1.0, -1.0]])).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["plywise.backward_scale.step"] == 1
    rule.detach()
