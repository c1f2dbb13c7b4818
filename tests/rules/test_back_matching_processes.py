"""Two processes share one measurement, though their networks take different ways."""

import pytest
import torch
from back_matching_worker import STEPS, main

from processes import run_two_ranks


@pytest.mark.slow
def test_processes_use_the_same_measurement(tmp_path):
    one, two = run_two_ranks(main, tmp_path)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name])
    for step in range(STEPS):
        (mine, kept), (yours, others) = one["steps"][step], two["steps"][step]
        assert kept == others
        assert "block" in mine
        assert ("block" in yours) == (step > 2)
        if step == 0:  # each has its own first measurement; afterwards they have the mean of both
            assert mine["first"] != yours["first"]
            assert kept == [(mine["first"][0] + yours["first"][0]) / 2]
        else:
            assert mine["first"] == yours["first"] == one["steps"][step - 1][1]
