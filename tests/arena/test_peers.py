"""Peers on awkward models, Muon against torch's own, and what a missing package is called."""

import sys

import pytest
import torch
from method_settings import STEPS, setting
from torch import nn

import plywise as pw
from plywise.arena.methods import PEERS, find_method
from plywise.arena.methods.peers import MuonAdamW, hidden_weights
from plywise.arena.task import SEQUENCES


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
    hidden = hidden_weights(model, TOKENS[:2])
    names = {name for name, p in model.named_parameters() if any(p is one for one in hidden)}
    assert names == {
        "convolution.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "hidden.weight",
    }
    model.hidden.requires_grad_(False)
    assert len(hidden_weights(model, TOKENS[:2])) == 3
    assert hidden_weights(nn.Linear(4, 2), torch.ones(2, 4)) == [], "the only layer gives the output"
    assert model.training


def test_muon_is_torchs_muon_and_adamw():
    first, second = nn.Linear(8, 8), nn.Linear(8, 4)
    models = [nn.Sequential(first, second)]
    models.append(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    models[1].load_state_dict(models[0].state_dict())
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    ours = MuonAdamW([first.weight], [first.bias, *second.parameters()], **numbers)
    muon = torch.optim.Muon([models[1][0].weight], adjust_lr_fn="match_rms_adamw", **numbers)
    adamw = torch.optim.AdamW([models[1][0].bias, *models[1][1].parameters()], **numbers)
    x = torch.rand(16, 8)
    for rate in (0.01, 0.005, 0.001):
        for optimizer in (ours, muon, adamw):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        for model in models:
            model(x).square().mean().backward()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_muon_flattens_convolutions_and_resumes():
    def run(stop):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        flat = nn.Parameter(model[0].weight.detach().flatten(1).clone())
        model.to(memory_format=torch.channels_last)
        made = lambda: MuonAdamW([model[0].weight], [model[0].bias, *model[2].parameters()], lr=0.02)  # noqa: E731
        optimizer, muon = (
            made(),
            torch.optim.Muon([flat], lr=0.02, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        )
        x = torch.rand(8, 2, 4, 4)
        for step in range(6):
            if step == stop:
                state = optimizer.state_dict()
                optimizer = made()
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            flat.grad = model[0].weight.grad.flatten(1).clone()
            optimizer.step()
            muon.step()
        return model[0].weight.detach().flatten(1), flat.detach(), model[2].weight.detach()

    straight, resumed = run(None), run(3)
    assert torch.equal(straight[0], straight[1])
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("name", ["soap", "shampoo", "foof+soap"])
def test_missing_package_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    method = find_method(name)
    with pytest.raises(pw.PlywiseError, match=r"pytorch_optimizer.*pip install 'plywise\[bench\]'"):
        method.make(setting(method))


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_missing_package_is_said_before_anything_runs(name, monkeypatch):
    find_method(name).require()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(pw.PlywiseError, match=rf"Method {name} needs .*pytorch_optimizer.*plywise\[bench\]"):
        find_method(name).require()
    find_method("sgd").require()
