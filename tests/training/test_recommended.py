"""One line for those who do not want to choose."""

import inspect
import math
from collections import UserDict
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

import plywise as pw
from plywise.errors import AttachError, DataError

EVERY_LAYER = math.inf
"""A budget with which all layers are turned."""


def make_mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def test_it_trains() -> None:
    model = make_mlp(8, 32, 32, 2)
    optimizer, rule = pw.recommend(model, batch_size=64, budget=EVERY_LAYER)
    x = torch.randn(64, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert rule.explain().share == 1.0
    assert not rule.health.counts


def test_small_networks_are_left_to_the_optimizer() -> None:
    """Forward and backward of a layer with few rows take less time than to turn it."""
    model, plain = make_mlp(8, 32, 32, 2), make_mlp(8, 32, 32, 2)
    found = pw.recommend(model, batch_size=64)
    assert found.left == ("0", "2", "4")
    assert found.price == found.memory == 0
    assert "No layer is worth the time of coordinates" in found.explain()
    assert "Warning" not in found.explain()
    alone = pw.recommend(plain, batch_size=64)
    alone.rule.detach()
    for _ in range(5):
        for network, optimizer in ((model, found.optimizer), (plain, alone.optimizer)):
            optimizer.zero_grad()
            network(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))
    assert not found.rule.health.counts


def test_layers_with_many_rows_are_turned_and_the_output_layer_before_others() -> None:
    def find_turned(batch_size: int) -> set[str]:
        found = pw.recommend(make_mlp(64, 128, 128, 10), batch_size=batch_size)
        return {"0", "2", "4"} - set(found.left)

    assert find_turned(16) == set()
    assert find_turned(128) == {"4"}
    assert find_turned(2048) == {"0", "2", "4"}


def test_layers_of_unknown_size_are_turned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    found = pw.recommend(model)
    assert found.left == ()
    assert "2 of 2 layers" in found.explain()


def test_a_model_without_hidden_weights_is_turned_at_any_price() -> None:
    found = pw.recommend(nn.Linear(100, 1), batch_size=10)
    assert found.price > 1
    assert found.left == ()


def test_wide_layers_get_as_many_directions_as_the_budget_allows() -> None:
    model = make_mlp(784, 256, 10)
    ranks, prices = [], []
    for budget in (5.0, 0.2, 0.12):
        found = pw.recommend(model, batch_size=2048, budget=budget)
        assert found.price <= budget
        assert found.left == ()
        ranks.append(found.rule.rank)
        prices.append(found.price)
        found.rule.detach()
    assert ranks == [64, 64, 32]
    assert prices == sorted(prices, reverse=True)


def test_what_does_not_fit_is_left_and_named() -> None:
    model = make_mlp(20, 2000, 2000, 4)
    found = pw.recommend(model, batch_size=300)
    assert found.left == ("0", "2")  # of so few rows their own steps take little time
    assert "Too expensive for coordinates: 0, 2." in found.explain()
    assert {row.name for row in found.rule.explain().rows if not row.handled} == set(found.left)


def test_muon_moves_hidden_weights_that_are_not_too_wide() -> None:
    model = make_mlp(20, 64, 64, 3000, 4)
    found = pw.recommend(model, batch_size=8)
    assert found.muon == ("0.weight", "2.weight"), (
        "64 x 3000 takes too much for 8 rows, and the last is the output"
    )
    by_muon, others = (group["params"] for group in found.optimizer.param_groups)
    assert [id(p) for p in by_muon] == [id(model[0].weight), id(model[2].weight)]
    assert {id(p) for p in (*by_muon, *others)} == {id(p) for p in model.parameters()}
    assert "Muon moves hidden weights, 0.weight and 1 other, which takes" in found.explain()


class Recurrent(nn.Module):
    """The last state of an LSTM, and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Backwards(nn.Module):
    """Its first module runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(6, 2), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def test_a_batch_shows_which_layer_gives_the_output() -> None:
    assert pw.recommend(Backwards(), batch=torch.ones(3, 4)).muon == ("body.weight",)
    assert pw.recommend(Backwards()).muon == ("head.weight",), "without one, the last module is taken for it"


@pytest.mark.parametrize("make", [make_convnet, lambda: pw.nn.unroll(Recurrent())], ids=["conv", "recurrent"])
def test_with_a_batch_explain_knows_every_call_before_the_first_step(make) -> None:
    model = make()
    x = torch.randn(4, 3, 12, 12) if isinstance(model, nn.Sequential) else torch.randn(4, 5, 3)
    text = pw.recommend(model, batch=x, budget=EVERY_LAYER).explain()
    assert "after 1st batch" not in text
    assert "no call of a linear map has been seen" not in text


def test_the_batch_that_is_shown_leaves_no_trace() -> None:
    """Weights are those of a training whose rule has not seen it, although nothing zeroes its gradients."""
    x, found = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1)), []
    for shows in (True, False):
        model = make_convnet()
        made = pw.recommend(model, batch=x, budget=EVERY_LAYER)
        optimizer, rule = made.optimizer, made.rule
        if not shows:
            rule.detach()
            rule.attach(model, optimizer)
        for step in range(7):
            model(x[step : step + 8]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
        assert not rule.health.counts
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class TransposedLinear(nn.Module):
    """A linear map of another library: its weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_muon_moves_the_maps_of_other_libraries_and_no_norms() -> None:
    model = nn.Sequential(TransposedLinear(4, 6), nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3)), nn.Flatten())
    model.append(nn.Linear(6, 2))
    assert pw.recommend(model, batch=torch.ones(3, 4)).muon == ("0.weight",)


def test_a_frozen_layer_still_gives_the_output() -> None:
    for batch in (torch.ones(3, 4), None):
        model = make_mlp(4, 6, 6, 2)
        model[-1].requires_grad_(False)
        assert pw.recommend(model, batch=batch).muon == ("0.weight", "2.weight")


def test_without_hidden_weights_adamw_moves_all() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
    found = pw.recommend(model)
    assert isinstance(found.optimizer, torch.optim.AdamW)
    assert found.muon == ()
    assert "AdamW moves all parameters" in found.explain()


def test_a_model_that_nothing_fits_is_refused() -> None:
    with pytest.raises(AttachError, match="fits a budget of 1e-06"):
        pw.recommend(make_mlp(2000, 2000, 2000), batch_size=1, budget=1e-6)
    with pytest.raises(ValueError, match="budget"):
        pw.recommend(make_mlp(2, 2), budget=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LayerNorm(4), "nothing better than AdamW for this LayerNorm"),
        (nn.Linear(4, 2).requires_grad_(False), "none of its layers trains"),
        (weight_norm(nn.Linear(4, 2)), "alone: no call of a linear map"),
        (nn.ReLU(), "it has no parameters"),
        (3, "needs a torch.nn.Module"),
    ],
    ids=["norm", "frozen", "computed", "no parameters", "no module"],
)
def test_a_model_without_anything_to_recommend_is_refused(model, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        pw.recommend(model)


def test_any_mapping_is_a_batch_by_name() -> None:
    """As the encoding of a tokenizer of Hugging Face is, which is no dict."""
    model = make_mlp(8, 16, 2)
    found = pw.recommend(model, batch=UserDict(input=torch.randn(4, 8)))
    assert all(row.passes for row in found.rule.explain().rows if row.handled)
    found.rule.detach()


@pytest.mark.parametrize(
    ("batch", "called"),
    [
        (torch.randn(4, 7), r"model\(batch\)"),
        ((torch.randn(4, 8), torch.zeros(4)), r"model\(\*batch\)"),
        ({"x": torch.randn(4, 8)}, r"model\(\*\*batch\)"),
        (UserDict(x=torch.randn(4, 8)), r"model\(\*\*batch\)"),
        (DataLoader(torch.randn(4, 8)), r"model\(batch\)"),
    ],
    ids=["shape", "with targets", "name", "encoding", "loader"],
)
def test_a_batch_that_the_model_does_not_take_is_refused(batch, called: str) -> None:
    model = make_mlp(8, 16, 2)
    with pytest.raises(DataError, match=f"this Sequential as {called}, and it fails: .* no targets, and"):
        pw.recommend(model, batch=batch)
    pw.recommend(model).rule.detach()  # nothing is left on the model


def test_adamw_moves_all_where_a_parameter_is_complex() -> None:
    model = make_convnet()
    model.register_parameter("spectrum", nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat)))
    x = torch.randn(4, 3, 12, 12)
    optimizer, rule = pw.recommend(model, batch=x)
    assert isinstance(optimizer, torch.optim.AdamW)
    (model(x).square().mean() + model.spectrum.abs().mean()).backward()
    before = model.spectrum.detach().clone()
    optimizer.step()
    assert not torch.equal(model.spectrum, before)
    rule.detach()


class MixedHeads(nn.Module):
    """A parameter that no layer of torch owns, and a projection whose parts are used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix = nn.Parameter(torch.eye(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        hidden = self.first(x)
        mixed = torch.einsum("bti,ij->btj", hidden, self.mix)
        return self.last(self.attention(hidden, mixed, mixed, need_weights=False)[0])


@pytest.mark.parametrize("budget", [1e-3, 0.3, EVERY_LAYER])
def test_weights_of_no_layer_of_torch_are_taken_or_left(budget: float) -> None:
    model, x = MixedHeads(), torch.randn(64, 5, 6)
    optimizer, rule = pw.recommend(model, batch=x, budget=budget)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    rows = {row.name: row.handled for row in rule.explain().rows}
    assert rows["mix"] == (budget == EVERY_LAYER)
    assert not rule.health.counts


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["x", "()", "{}"])
def test_a_batch_tells_the_sizes_of_convolutions_and_leaves_no_trace(wrap) -> None:
    model = make_convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = pw.recommend(model, batch=wrap(torch.randn(16, 3, 12, 12)), budget=EVERY_LAYER)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.price > 0
    assert "0.25" in found.explain()


def test_larger_batches_make_a_step_relatively_cheaper() -> None:
    few = pw.recommend(make_convnet(), batch=torch.randn(4, 3, 12, 12), budget=10.0)
    many = pw.recommend(make_convnet(), batch=torch.randn(4, 3, 12, 12), batch_size=256, budget=10.0)
    same = pw.recommend(make_convnet(), batch=torch.randn(256, 3, 12, 12), budget=10.0)
    assert many.price == same.price < few.price


def test_the_arena_has_it() -> None:
    from plywise.arena.methods import METHODS, find_method

    assert "recommended" in METHODS
    method = find_method("recommended")
    settings = inspect.signature(pw.recommend).parameters
    assert {name: one.default for name, one in method.space.items()} == {
        name: settings[name].default for name in ("lr", "weight_decay")
    }
    assert not method.baseline


@pytest.mark.parametrize("budget", [0.5, EVERY_LAYER])
def test_a_saved_optimizer_resumes(budget: float) -> None:
    runs = []
    for stop in (False, True):
        model = make_mlp(8, 16, 2)
        optimizer, rule = pw.recommend(model, budget=budget)
        x, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
        for step in range(24):
            if stop and step == 13:
                weights, state = model.state_dict(), optimizer.state_dict()
                rule.detach()
                model = make_mlp(8, 16, 2)
                optimizer, rule = pw.recommend(model, budget=budget)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_power_is_the_users_choice() -> None:
    assert pw.recommend(make_mlp(8, 16, 2), power=0.0).rule.power == 0.0
    with pytest.raises(ValueError, match="power must be between 0 and 1"):
        pw.recommend(make_mlp(8, 16, 2), power=2.0)


def test_the_damping_is_the_users_choice() -> None:
    assert pw.recommend(make_mlp(8, 16, 2), damping=0.5).rule.damping == 0.5
    with pytest.raises(ValueError, match="damping must be"):
        pw.recommend(make_mlp(8, 16, 2), damping=-1.0)


def step_on_nan(on_nonfinite: str, budget: float) -> bool:
    """A step on inputs of NaN; whether the weights are what they were."""
    model = make_mlp(8, 16, 2)
    made = pw.recommend(model, batch_size=4, budget=budget, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.full((4, 8), torch.nan)).sum().backward()
    made.optimizer.step()
    return all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("budget", [0.5, EVERY_LAYER])
def test_gradients_that_are_not_finite_are_treated_as_the_user_says(budget: float) -> None:
    with pytest.warns(RuntimeWarning, match="not finite, so this step was not taken"):
        assert step_on_nan("skip", budget)
    assert not step_on_nan("propagate", budget)
    with pytest.raises(pw.NonFiniteError, match="not finite"):
        step_on_nan("raise", budget)
