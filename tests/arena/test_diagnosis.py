"""The diagnosis against closed forms, its side effects, and unusual models."""

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena.diagnostics.covariance import MOST_FEATURES
from plywise.arena.diagnostics.diagnosis import (
    diagnose,
    diagnose_workload,
    layer_series,
    layers_before,
)
from plywise.arena.diagnostics.layer_record import MOST_ROWS
from plywise.arena.workloads import find_workload
from plywise.errors import NonFiniteError, PlywiseError


def make_cross(scales, copies=1):
    """Make rows ±s_i e_i: mean 0 and a covariance that is diagonal in s_i² / d."""
    rows = torch.diag(torch.tensor(scales, dtype=torch.float32))
    return torch.cat([rows, -rows] * copies)


def halves(output, y):
    """A loss whose gradient at the output is known: ±1 / (2 · batch) for each entry."""
    return (output * y).sum() / (2 * len(y))


def diagnose_model(model, x, *, loss=halves, y=None, **more):
    return diagnose(model, loss, [(x, torch.ones(len(x), 1) if y is None else y)], **more)


def index_layers(diagnosis):
    return {layer.name: layer for layer in diagnosis.layers}


def make_mlp(*widths, activation=nn.ReLU):
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def make_batches(count, size, features, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, features, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


# ---- closed forms --------------------------------------------------------------------------------


def test_condition_number_and_effective_rank_of_a_known_covariance():
    read = diagnose_model(nn.Linear(3, 1), make_cross([1.0, 2.0, 10.0])).layers[0].read
    squares = [1.0, 4.0, 100.0]
    assert read.condition == pytest.approx(100.0, rel=1e-12)
    assert read.effective_rank == pytest.approx(sum(squares) ** 2 / sum(s * s for s in squares), rel=1e-12)
    assert (read.rows, read.features, read.constant, read.rank) == (6, 3, 0, 3)
    assert not read.at_least
    assert read.mean_share == pytest.approx(0.0, abs=1e-12)
    assert read.spread == pytest.approx(5.0)


def test_the_covariance_of_several_batches_is_that_of_their_union():
    whole = make_cross([1.0, 3.0, 5.0, 7.0])
    parts = [(part, torch.ones(len(part), 1)) for part in whole.split([1, 4, 3])]
    model = nn.Linear(4, 1)
    apart, together = diagnose(model, halves, parts).layers[0], diagnose_model(model, whole).layers[0]
    assert apart.read.condition == pytest.approx(together.read.condition, rel=1e-10)
    assert apart.read.condition == pytest.approx(49.0, rel=1e-10)


def test_white_inputs_have_a_condition_number_of_about_one():
    x = torch.randn(6000, 20)
    centred = x - x.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(x))).T
    parts = [(part, torch.ones(len(part), 1)) for part in white.split(MOST_ROWS)]
    read = diagnose(nn.Linear(20, 1), halves, parts).layers[0].read
    assert read.condition == pytest.approx(1.0, abs=1e-4)
    assert read.effective_rank == pytest.approx(20.0, abs=1e-4)
    chance = diagnose_model(nn.Linear(20, 1), x).layers[0].read
    assert chance.rows == MOST_ROWS, "of many rows some are looked at"
    assert chance.condition == pytest.approx(chance.white, rel=0.2)


def test_a_wide_layer_is_diagnosed_in_part_with_a_lower_bound():
    width = MOST_FEATURES + 100
    x = torch.randn(MOST_ROWS, width) * torch.linspace(1, 3, width)
    read = diagnose_model(nn.Linear(width, 1), x).layers[0].read
    assert read.features == MOST_FEATURES
    assert read.at_least
    assert read.condition <= float(torch.linalg.cond(x.double().T.cov()))


def test_a_convolution_reads_patches():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 16, 1))
    x = torch.randn(20, 2, 6, 6)
    layer = diagnose_model(model, x).layers[0]
    patches = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 18).double()
    assert (layer.inputs, layer.outputs, layer.rows, layer.parameters) == (18, 3, 16, 57)
    assert layer.read.condition == pytest.approx(float(torch.linalg.cond(patches.T.cov())), rel=1e-8)


def test_the_worst_group_of_a_grouped_convolution_is_reported():
    x = torch.cat([make_cross([1.0, 2.0], 3), make_cross([1.0, 9.0], 3)], 1)[:, :, None]
    model = nn.Sequential(nn.Conv1d(4, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, 1))
    assert diagnose_model(model, x).layers[0].read.condition == pytest.approx(81.0, rel=1e-9)


def test_backward_values_and_effective_rates_of_a_linear_net_scaled_by_1000():
    """If W of one layer is scaled by c, layers below get c times the gradient, and its rate falls by c²."""
    model = nn.Sequential(
        *(nn.Linear(5, 5, bias=False) for _ in range(3)), nn.Linear(5, 1, bias=False)
    ).double()
    x = torch.randn(16, 5, dtype=torch.float64)
    before = diagnose_model(model, x)
    with torch.no_grad():
        model[1].weight.mul_(1000)
    after = diagnose_model(model, x)
    backward = [b.backward / a.backward for a, b in zip(before.layers, after.layers, strict=True)]
    assert backward == pytest.approx([1000, 1, 1, 1], rel=1e-5)
    rates = [b.rate / a.rate for a, b in zip(before.layers, after.layers, strict=True)]
    assert rates == pytest.approx([1000, 1 / 1000, 1000, 1000], rel=1e-5)
    assert after.backward_ratio == pytest.approx(before.backward_ratio / 1000, rel=1e-5)


def test_the_last_layers_backward_value_and_step_by_hand():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    layer = diagnose_model(model, torch.tensor([[1.0, 0.0], [0.0, 2.0]])).layers[0]
    assert layer.backward == pytest.approx(0.25), "each row's gradient is 1 / (2 · 2)"
    assert layer.backward_to_last == 1.0
    assert layer.rate == pytest.approx(math.hypot(0.25, 0.5) / 5)
    assert layer.noise is None, "one batch shows no noise"


def test_tiny_gradients_do_not_underflow():
    found = diagnose_model(
        nn.Linear(3, 1), make_cross([1.0, 2.0, 3.0]), loss=lambda o, y: halves(o, y) * 1e-30
    ).layers[0]
    plain = diagnose_model(nn.Linear(3, 1), make_cross([1.0, 2.0, 3.0])).layers[0]
    assert found.backward == pytest.approx(plain.backward * 1e-30, rel=1e-5)
    assert found.backward > 0


def test_noise_is_nothing_for_equal_batches_and_all_for_opposite_ones():
    model, x, y = nn.Linear(3, 1), make_cross([1.0, 2.0, 3.0])[:3], torch.ones(3, 1)
    assert diagnose(model, halves, [(x, y)] * 4).layers[0].noise == pytest.approx(0.0, abs=1e-6)
    assert diagnose(model, halves, [(x, y), (x, -y)] * 2).layers[0].noise == 1.0
    # gradients 3g and g: mean square 5, square of the mean 4, variance 2 of the whole 5
    assert diagnose(model, halves, [(x, 3 * y), (x, y)]).layers[0].noise == pytest.approx(0.4, rel=1e-5)


def test_silent_outputs_are_zero_for_all_samples():
    model = make_mlp(4, 8, 1)
    with torch.no_grad():
        model[0].bias[:6] = -100.0
        model[0].bias[6:] = 100.0
    layers = index_layers(diagnose_model(model, torch.randn(30, 4)))
    assert layers["0"].silent == 0.75
    assert layers["2"].silent == 0.0


# ---- nothing is left behind ----------------------------------------------------------------------


class Everything(nn.Module):
    """Buffers that change in a forward pass, dropout, gradients, hooks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4 * 6, 3)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x.unsqueeze(1))).relu().flatten(1)))


def list_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    tensor = [
        (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) for p in model.parameters()
    ]
    return found, tensor


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was_to_the_last_bit(training):
    model = Everything().train(training)
    model.norm.train()  # a mode of its own
    nn.functional.cross_entropy(model(torch.randn(5, 8)), torch.arange(5) % 3).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    hooks, modes, random = list_hooks(model), [m.training for m in model.modules()], torch.get_rng_state()
    assert len(diagnose(model, nn.functional.cross_entropy, make_batches(3, 10, 8, 3)).layers) == 2
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == list_hooks(model)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(gradients[name], p.grad) for name, p in model.named_parameters())


def test_nothing_is_left_when_it_fails_in_the_middle():
    model = Everything()
    good = make_batches(2, 10, 8, 3)
    bad = [good[0], (good[1][0] * float("nan"), good[1][1])]
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(PlywiseError, match="loss of batch 2 is nan"):
        diagnose(model, nn.functional.cross_entropy, bad)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert sum(list_hooks(model)[0]) == 0


def test_the_same_seed_gives_the_same_diagnosis():
    model = Everything()
    one, same = (
        diagnose(model, nn.functional.cross_entropy, make_batches(2, 10, 8, 3), seed=7) for _ in range(2)
    )
    assert one == same
    assert one != diagnose(model, nn.functional.cross_entropy, make_batches(2, 10, 8, 3), seed=8), "dropout"


def test_a_model_with_a_rule_at_work_is_seen_without_it_and_keeps_it():
    model, data = make_mlp(4, 6, 3), make_batches(2, 10, 4, 3)
    plain = diagnose(model, nn.functional.cross_entropy, data)
    rule = pw.ProxProp(tau=3.0).attach(model)
    assert diagnose(model, nn.functional.cross_entropy, data) == plain
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    assert rule.explain(10).rows[0].handled
    rule.detach()


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert diagnose_model(nn.Linear(3, 1), torch.randn(6, 3)).layers[0].rate > 0


# ---- odd models ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer used twice, one never, one frozen at the bottom, one in the middle."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.bottom = nn.Linear(4, 4).requires_grad_(False)
        self.again = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.middle(self.again(self.again(self.bottom(x)).tanh())))


def test_layers_used_twice_never_and_frozen():
    x = torch.randn(12, 4)
    found = diagnose_model(Twice(), x)
    layers = index_layers(found)
    assert [layer.name for layer in found.layers] == ["again", "last", "never", "bottom", "middle"]
    assert layers["again"].uses == 2.0
    assert layers["again"].read.rows == 24
    assert layers["again"].rows == 1.0
    assert (layers["never"].uses, layers["never"].read, layers["never"].rate) == (0.0, None, None)
    assert (layers["bottom"].uses, layers["bottom"].trains) == (0.0, False)
    assert not layers["middle"].trains
    assert layers["middle"].rate is None  # frozen: autograd's alone


def test_the_gradient_of_a_layer_used_twice_is_the_sum_of_both_calls():
    model, x = Twice(), torch.randn(12, 4)
    rate = index_layers(diagnose_model(model, x))["again"].rate
    halves(model(x), torch.ones(12, 1)).backward()
    weight = model.again.weight
    assert rate == pytest.approx((weight.grad.norm() / weight.norm()).item(), rel=1e-5)


def test_a_weight_used_without_its_layer_is_diagnosed():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(x @ self.odd.weight)

    found = diagnose_model(Apart(), torch.randn(6, 4))
    assert [layer.name for layer in found.layers] == ["odd", "last"]


def test_a_model_without_a_layer_for_a_rule():
    model = nn.Sequential(nn.LayerNorm(3))
    found = diagnose_model(model, torch.randn(4, 3), y=torch.ones(4, 3))
    assert found.layers == ()
    assert [one.type for one in found.left] == ["LayerNorm"]
    assert (found.loss, found.rate_spread, found.backward_ratio) == (None, None, None)


def test_a_lazy_layer_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    found = diagnose_model(model, torch.randn(6, 5))
    assert index_layers(found)["0"].inputs == 5
    assert model[0].has_uninitialized_params()


def test_sequences_have_a_row_for_each_token():
    layer = diagnose_model(nn.Linear(3, 1), torch.randn(4, 7, 3), y=torch.ones(4, 7, 1)).layers[0]
    assert layer.rows == 7.0
    assert layer.read.rows == 28


def test_half_precision_is_looked_at_in_double():
    found = diagnose_model(
        nn.Linear(3, 1).bfloat16(), make_cross([1.0, 2.0, 4.0]).bfloat16(), y=torch.ones(6, 1).bfloat16()
    )
    assert found.layers[0].read.condition == pytest.approx(16.0, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "kept", "what"),
    [
        (nn.Linear(3, 1), [], "there is none"),
        (nn.Linear(3, 1).requires_grad_(False), [(torch.ones(2, 3), torch.ones(2, 1))], "trains"),
    ],
)
def test_models_that_cannot_be_diagnosed_are_refused(model, kept, what):
    with pytest.raises(PlywiseError, match=what):
        diagnose(model, halves, kept)


def test_an_infinite_backward_value_names_its_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with pytest.raises(NonFiniteError, match="'1'"):
        diagnose_model(model, torch.zeros(4, 3), loss=lambda output, y: (output - output).abs().sqrt().sum())


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("no copies. Never")

    with pytest.raises(PlywiseError, match=r"no copies\).*fresh one"):
        diagnose_model(Stubborn(3, 1), torch.ones(2, 3))


# ---- workloads and the report --------------------------------------------------------------------


def test_a_workload_gets_the_same_diagnosis_for_the_same_seed():
    digits = find_workload("digits-conv")
    data = digits.make_data()
    one = diagnose_workload(digits, data, batches=2, batch_size=50)
    assert one == diagnose_workload(digits, data, batches=2, batch_size=50)
    assert one != diagnose_workload(digits, data, batches=2, batch_size=50, seed=1)
    assert (one.batches, one.batch_size) == (2, 50)
    with pytest.raises(PlywiseError, match="1 at least"):
        diagnose_workload(digits, data, batches=0)


def test_a_diagnosis_is_json_and_a_series_for_the_report():
    found = diagnose_model(Twice(), torch.randn(12, 4))
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["layers"][0]["name"] == "again"
    series = layer_series(found)
    assert series["names"] == ["again", "last"]
    assert {len(values) for values in series.values()} == {2}
    json.dumps(series, allow_nan=False)


def test_a_bench_records_the_layers_before_training_or_the_reason():
    digits = find_workload("digits-mlp")
    data = digits.make_data()
    before = layers_before(digits, data)
    assert before["layers"] == layer_series(diagnose_workload(digits, data))
    assert before["layers"]["names"] == ["0", "2", "4", "6"]
    wrong = layers_before(replace(digits, make_model=lambda: nn.Linear(3, 3)), data)
    assert wrong["layers"] is None
    assert "shapes cannot be multiplied" in wrong["unseen"]
