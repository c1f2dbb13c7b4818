"""What `rule.explain()` says of layers that do not train."""

import math

import pytest
import torch
from torch import nn

import plywise as pw


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2).backward()
        optimizer.step()


@pytest.mark.parametrize("make_rule", [pw.ProxProp, pw.BackMatching, pw.Foof, pw.Coordinates])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("has_all", [True, False])
def test_a_frozen_layer_is_left_alone_and_not_in_the_share(make_rule, steps, has_all):
    """Whether the optimizer has its weights or not, and before and after the first batch."""
    model = make_network()
    model[0].requires_grad_(False)
    frozen = [p.clone() for p in model[0].parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if has_all or p.requires_grad], 0.1)
    rule = make_rule().attach(model, optimizer)
    train(model, optimizer, steps)
    table = rule.explain()
    row = table.rows[0]
    assert (row.name, row.handled, row.parameters, row.frozen) == ("0", False, 0, 8 * 16 + 16)
    assert "frozen" in row.reason
    assert (table.share, table.parameters, table.frozen) == (1.0, 16 * 16 + 16 + 16 * 2 + 2, 8 * 16 + 16)
    assert "100 % of 306 parameters that train handled, 2 of 2 layers, 144 parameters frozen" in str(table)
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True))


def test_a_model_without_frozen_layers_says_nothing_of_them():
    model = make_network()
    table = pw.ProxProp().attach(model).explain()
    assert "100 % of 450 parameters handled, 3 of 3 layers\n" in str(table)
    assert "frozen" not in str(table)


def test_the_bias_of_a_frozen_weight_counts_and_the_weight_does_not():
    model = make_network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    before = model[0].bias.clone()
    train(model, optimizer)
    row = rule.explain().rows[0]
    assert (row.handled, row.parameters, row.frozen) == (True, 16, 128)
    assert "of its bias" in row.treatment
    assert not torch.equal(model[0].bias, before)


def test_a_bias_whose_weight_nobody_steps_is_said_to_be_added():
    model = make_network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    train(model, optimizer)
    reasons = {row.name: row.reason for row in rule.explain().rows}
    assert reasons["0.bias"] == "linear adds it to the output of a weight that the rule leaves alone"


@pytest.mark.parametrize("steps", [0, 1])
def test_the_bias_of_a_norm_is_left_for_the_same_reason_as_its_weight(steps):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    for _ in range(steps):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    (norm,) = (row for row in rule.explain().rows if row.name.startswith("1"))
    assert (norm.shape, norm.parameters) == ("6, 6", 12)
    assert norm.reason.startswith("its kind, 'norm', is left to the optimizer")


def test_recommend_does_not_count_frozen_layers():
    model = make_network()
    model[0].requires_grad_(False)
    recommendation = pw.recommend(model, batch=torch.randn(32, 8), budget=math.inf)
    table = recommendation.rule.explain()
    assert not table.rows[0].handled
    assert table.share == 1
    assert "144 parameters frozen" in recommendation.explain()


def test_a_rule_may_be_asked_for_no_layer():
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = pw.ProxProp().attach(model, optimizer, layers=[])
    assert rule.explain().share == 0
    before = [p.clone() for p in model.parameters()]
    model(torch.full((4, 8), torch.nan)).sum().backward()
    with pytest.warns(RuntimeWarning, match="not finite, so this step was not taken"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_model_that_is_all_frozen_has_nothing_to_share():
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    model.requires_grad_(False)
    table = rule.explain()
    assert (table.share, table.parameters, table.frozen) == (0.0, 0, 450)
    assert "0 % of 0 parameters that train handled, 0 of 0 layers" in str(table)
    assert not any(row.handled for row in table.rows)


@pytest.mark.parametrize("make_rule", [pw.ProxProp, pw.Foof])
def test_a_weight_that_has_been_replaced_is_not_handled_if_the_optimizer_steps_the_old_one(make_rule) -> None:
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = make_rule().attach(model, optimizer)
    train(model, optimizer)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    rows = {row.name: row for row in rule.explain().rows}
    assert rows["0"].handled
    assert not rows["2"].handled
    assert rows["2"].reason == "the optimizer given to attach() does not step it"


def test_a_head_tied_to_an_embedding_says_so() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body, self.head = (
                nn.Embedding(9, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 9, bias=False),
            )
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.words(ids)))

    model = Tokens()
    rule = pw.ProxProp().attach(model)
    reasons = {row.name: row.reason for row in rule.explain().rows}
    assert reasons["head"].startswith(
        "its weight is tied with 'words' (Embedding), its kind, 'embedding', is left"
    )
    assert reasons["words"].startswith("its kind, 'embedding', is left")


def test_long_reasons_stand_once_below_the_table():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8))
    lines = str(pw.ProxProp().attach(model).explain()).split("\n")
    reasons = [line for line in lines if line.startswith("note 1: its kind, 'norm', is left to")]
    assert len(reasons) == 1
    assert sum(line.startswith(("1 ", "2 ")) and "note 1" in line for line in lines) == 2
    assert all(len(line) < 110 for line in lines if line not in reasons)
