"""The advice matches the planted problem: each problem has its own advice, and a good model gets none."""

import itertools
import math
import shlex

import pytest
import torch
from torch import nn

from plywise.arena.diagnostics.advice import ELSEWHERE, MEASURED, PLAIN, RATE_SPREAD, advice, outlying
from plywise.arena.diagnostics.diagnosis import diagnose
from plywise.arena.methods import find_method
from plywise.arena.workloads import QUICK, find_workload


def make_network(*widths, scales=None):
    """Make a ReLU network as in benchmarks/bad_scaling.py: He initialisation, weights times ``scales``."""
    generator, layers = torch.Generator().manual_seed(0), []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, math.sqrt(2 / inputs), generator=generator).mul_(
                scales[i] if scales else 1
            )
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_white_batches(count=8, size=128, features=16, classes=10):
    """Make batches of white inputs and random labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, features, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def make_digit_batches(count=8, size=128):
    """Make batches of the digits."""
    data = find_workload("digits-mlp").make_data()
    return list(
        zip(data.train.x.split(size)[:count], data.train.y.split(size)[:count], strict=True),
    )


def diagnose_model(model, batches):
    return diagnose(model, nn.functional.cross_entropy, batches)


def list_advice(model, batches, subject="--workloads x"):
    return advice(diagnose_model(model, batches), subject)


def test_white_inputs_and_good_scaling_get_only_adamw():
    (only,) = list_advice(nn.Linear(16, 10), make_white_batches())
    assert (only.method, only.sure) == ("adamw", f"{PLAIN}.")
    assert "Nothing stands out" in only.reason
    assert "no layer reads inputs that are far from white" in only.reason


@pytest.mark.parametrize(
    "scales", [(10, 0.1, 10, 0.1, 1), (30, 1 / 30, 1 / 30, 30, 1), (3, 0.1, 2, 0.2, 0.5), (0.3,) * 5]
)
def test_the_bad_scalings_of_the_benchmark_are_all_found(scales):
    found = list_advice(make_network(64, 48, 48, 48, 48, 10, scales=scales), make_digit_batches())
    assert [one.method for one in found[:2]] == ["consequentialism", "back-matching"]
    assert found[0].sure.startswith(MEASURED)


def test_the_same_network_with_good_scaling_is_not_called_badly_scaled():
    found = list_advice(make_network(64, 48, 48, 48, 48, 10), make_digit_batches())
    assert [one.method for one in found] == ["feature-whitening+adamw"]


def test_the_numbers_in_the_reason_are_those_of_the_diagnosis():
    diagnosis = diagnose_model(make_network(64, 48, 48, 10, scales=(100, 0.01, 1)), make_digit_batches())
    first = advice(diagnosis)[0]
    assert diagnosis.rate_spread > RATE_SPREAD
    assert f"{diagnosis.rate_spread:.3g}" in first.reason
    rates = {layer.name: layer.rate for layer in diagnosis.layers}
    assert min(rates, key=rates.get) == "0"
    assert f"layer '0' by {rates['0']:.3g}" in first.reason
    assert f"layer '2' by {rates['2']:.3g}" not in first.reason or max(rates, key=rates.get) == "2"


def test_uneven_inputs_get_the_best_method_for_an_mlp_or_a_convnet():
    mlp = list_advice(make_network(64, 32, 10), make_digit_batches())
    assert mlp[0].method == "feature-whitening+adamw"
    assert mlp[0].sure.startswith(MEASURED)
    convnet = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    assert list_advice(convnet, make_digit_batches())[0].method == "foof+adamw"


def test_other_kinds_of_networks_are_not_called_measured():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 10)

        def forward(self, x):
            return self.last(self.first(x.unflatten(1, (8, 8))).relu().mean(1))

    (only,) = list_advice(Tokens(), make_digit_batches())
    assert only.method == "feature-whitening+adamw"
    assert only.sure.startswith(ELSEWHERE)


def test_a_network_much_larger_than_the_measured_ones_gets_a_note():
    (only,) = list_advice(make_network(64, 1700, 1700, 10), make_digit_batches(count=1))
    assert only.sure.startswith(ELSEWHERE)
    assert "yours has 3.02 million parameters" in only.sure


def test_inputs_with_a_mean_or_different_units_get_the_advice_to_normalise():
    far = [(x + 10, y) for x, y in make_white_batches()]
    assert list_advice(nn.Linear(16, 10), far)[0].title == "Normalise the inputs"
    assert "are their mean" in list_advice(nn.Linear(16, 10), far)[0].reason
    units = torch.ones(16)
    units[3] = 1000.0
    mixed = [(x * units, y) for x, y in make_white_batches()]
    assert "times that of the middle one" in list_advice(nn.Linear(16, 10), mixed)[0].reason


def test_dead_units_are_named_first():
    model = make_network(16, 32, 32, 10)
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
        model[2].bias[:4] = 0.0
    found = list_advice(model, make_white_batches())
    assert found[0].title == "Wake the dead units"
    assert "layer '2': " in found[0].reason
    assert found[0].check == "", "no bench mends that"


def test_adamw_is_not_called_fine_if_there_is_a_problem():
    only = list_advice(nn.Linear(16, 10), [(x + 10, y) for x, y in make_white_batches()])
    assert [one.title for one in only] == ["Normalise the inputs"]


def test_a_layer_wider_than_its_inputs_need_gets_the_advice_to_narrow_it():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 64), nn.Linear(64, 10))
    narrower = next(
        one for one in list_advice(model, make_white_batches()) if one.title == "Make it narrower"
    )
    assert "layer '2' reads 64 features, and 4 directions" in narrower.reason
    few = list_advice(model, make_white_batches(count=1, size=100))
    assert all(one.title != "Make it narrower" for one in few), "100 rows of 64 features tell too little"


def test_a_model_without_layers_for_rules_gets_no_method_but_a_reason():
    (only,) = list_advice(nn.LayerNorm(16), make_white_batches())
    assert (only.method, only.check) == ("", "")
    assert "LayerNorm" in only.reason


@pytest.mark.parametrize("name", QUICK)
def test_every_printed_command_runs_unchanged(name):
    workload = find_workload(name)
    data = workload.make_data()
    batches = [(data.train.x[:100], data.train.y[:100])]
    diagnosis = diagnose(workload.make_model(), workload.task.loss, batches)
    for one in advice(diagnosis, f"--workloads {name}"):
        words = shlex.split(one.check)
        assert words[:5] == ["plywise", "bench", "--workloads", name, "--methods"]
        methods = words[5].split(",")
        assert [find_method(method).name for method in methods] == methods
        assert one.method in methods
        assert "adamw" in methods, "advice is measured against what everybody uses"


def test_the_advice_is_about_the_outlying_layers():
    diagnosis = diagnose_model(
        make_network(64, 48, 48, 48, 48, 10, scales=(30, 1 / 30, 1 / 30, 30, 1)), make_digit_batches()
    )
    striking = {layer.name: outlying(layer, diagnosis) for layer in diagnosis.layers}
    assert "rate" in striking["0"]
    assert "rate" in striking["2"]
    assert "rate" not in striking["8"]
    assert all("condition" in found for found in striking.values())
    healthy = diagnose_model(nn.Linear(16, 10), make_white_batches())
    assert outlying(healthy.layers[0], healthy) == set()
