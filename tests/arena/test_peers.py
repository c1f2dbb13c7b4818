"""Peers on unusual models, Muon against torch's, and the message for a missing package."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_settings import STEPS, setting
from torch import nn

import plywise as pw
from plywise.arena.methods import PEERS, find_method
from plywise.arena.task import SEQUENCES
from plywise.optim.hidden_weights import find_hidden_weights


class Tied(nn.Module):
    """Tokens to scores: embedding, positions, convolution, attention, norm, a head tied to the first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 11, bias=False)  # registered first, runs last
        self.embedding = nn.Embedding(11, 16)
        self.head.weight = self.embedding.weight
        self.positions = nn.Parameter(torch.zeros(5, 16))
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x + torch.tanh(self.hidden(x))))


TOKENS = torch.arange(40).reshape(8, 5) % 11


@pytest.mark.parametrize("name", PEERS)
def test_peers_train_embeddings_norms_convolutions_and_tied_heads(name):
    method, model = find_method(name), Tied()
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = method.make(setting(method, model, example=TOKENS[:2], task=SEQUENCES, blocks=0, classes=0))
    losses = [trainer.step(TOKENS, TOKENS.roll(1, 1)) for _ in range(STEPS)]
    assert losses[-1] < losses[0] / 2
    for key, value in model.named_parameters():
        assert not torch.equal(value, before[key]), key
    assert model.head.weight is model.embedding.weight


def test_muon_gets_hidden_weights_whatever_their_order():
    model = Tied()
    hidden = find_hidden_weights(model, lambda: model(TOKENS[:2]))
    names = {name for name, p in model.named_parameters() if any(p is one for one in hidden)}
    assert names == {
        "convolution.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "hidden.weight",
    }
    model.hidden.requires_grad_(False)
    assert len(find_hidden_weights(model, lambda: model(TOKENS[:2]))) == 3
    assert find_hidden_weights(nn.Linear(4, 2)) == [], "the only layer gives the output"
    assert model.training


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_has_its_line_in_the_manual(name):
    manual = Path(__file__).parents[2] / "docs" / "how-to" / "arena.md"
    lines = [line for line in manual.read_text("utf-8").split("\n") if line.startswith("| `")]
    assert sum(f"`{name}`" in line.split(" | ")[0] for line in lines) == 1


@pytest.mark.parametrize("width", [64, 128])
def test_torchs_muon_and_ours_train_alike(width):
    """Two implementations of one method, without convolutions, which torch's does not support."""
    x, y, trained = torch.rand(64, width), torch.arange(64) % 10, []
    for name in ("muon", "torch-muon"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        method = find_method(name)
        numbers = {"lr": 5e-3, "weight_decay": 1e-2}
        trainer = method.make(replace(setting(method, model, example=x), numbers=numbers))
        for _ in range(10):
            trainer.step(x, y)
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # theirs iterates in bfloat16


def test_torchs_muon_has_the_cosine_in_both_of_its_parts():
    method = find_method("torch-muon")
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(248, 16), nn.ReLU(), nn.Linear(16, 10))
    x, y = torch.rand(8, 1, 64), torch.arange(8)
    trainer = method.make(setting(method, model, example=x))
    before = [p.detach().clone() for p in model.parameters()]
    muon, adamw = trainer.optimizer.parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(16, 248)]
    for _ in range(STEPS):
        trainer.step(x, y)
    assert [group["lr"] for part in (muon, adamw) for group in part.param_groups] == [0.0, 0.0]
    assert not any(torch.equal(one, p) for one, p in zip(before, model.parameters(), strict=True))


def test_muon_is_torchs_muon_on_hidden_weights_and_adamw_on_the_rest():
    method, x, y = find_method("muon"), torch.rand(16, 128), torch.arange(16) % 10
    models = [nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    trainer = method.make(setting(method, models[0], numbers=numbers, example=x))
    for group in trainer.optimizer.param_groups:
        group["ns_dtype"] = torch.bfloat16  # as torch's, also where the processor is slow in it
    muon = torch.optim.Muon([models[1][0].weight], adjust_lr_fn="match_rms_adamw", **numbers)
    adamw = torch.optim.AdamW([models[1][0].bias, *models[1][2].parameters()], **numbers)
    nn.functional.cross_entropy(models[1](x), y).backward()
    muon.step()
    adamw.step()
    trainer.step(x, y)
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=0, atol=1e-5)
    for layer in (0, 2):
        torch.testing.assert_close(models[0][layer].bias, models[1][layer].bias, rtol=0, atol=1e-6)
    torch.testing.assert_close(models[0][2].weight, models[1][2].weight, rtol=0, atol=1e-6)


def test_schedule_free_is_judged_by_its_mean_and_trains_on():
    method, x, y = find_method("schedule-free"), torch.rand(16, 64), torch.arange(16) % 10
    trainer = method.make(setting(method))
    for _ in range(12):
        trainer.step(x, y)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with torch.no_grad():
        of_iterates = trainer.model(x)
    assert not torch.allclose(trainer.predict(x), of_iterates, atol=1e-4)
    for one, other in zip(trainer.model.parameters(), before, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-6)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {method.space["lr"].default}


def test_every_peer_has_two_numbers_tuned():
    assert {len(find_method(name).space) for name in PEERS} == {2}


@pytest.mark.parametrize("name", ["schedule-free", "shampoo", "foof+shampoo"])
def test_missing_package_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    method = find_method(name)
    with pytest.raises(pw.PlywiseError, match=r"pytorch_optimizer.*pip install 'plywise\[bench\]'"):
        method.make(setting(method))


@pytest.mark.parametrize("name", ["schedule-free", "shampoo"])
def test_a_missing_package_is_reported_before_anything_runs(name, monkeypatch):
    find_method(name).require()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(pw.PlywiseError, match=rf"Method {name} needs .*pytorch_optimizer.*plywise\[bench\]"):
        find_method(name).require()
    find_method("sgd").require()
