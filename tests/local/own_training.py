"""Models and data for `plywise train`: targets of every kind, streams, a step function; the module `own`."""

import torch
import torch.nn.functional as F
from torch import nn

generator = torch.Generator().manual_seed(0)
X = torch.rand(96, 6, generator=generator)
IDS = torch.randint(9, (96, 5), generator=generator)
CLASSES = (X.sum(1) > 3).long() + (X.sum(1) > 3.5).long()


def classes():
    return X, CLASSES, X[:32], CLASSES[:32]


def labels():
    y = torch.stack([X[:, 0] > 0.5, X[:, 1] > 0.5, X[:, 2] > X[:, 3]], 1).float()
    return X, y, X[:32], y[:32]


def numbers():
    y = torch.stack([X.sum(1), X[:, 0] - X[:, 1]], 1)
    return X, y, X[:32], y[:32]


def number():
    return X, X.sum(1), X[:32], X[:32].sum(1)


def tokens():
    y = (IDS + 1) % 9
    y[:, -1] = -100
    return IDS, y, IDS[:32], y[:32]


def stream():
    for i in range(0, 96, 8):
        yield X[i : i + 8], CLASSES[i : i + 8]


def dicts():
    return [{"x": X[i : i + 8], "y": CLASSES[i : i + 8]} for i in range(0, 96, 8)].__iter__()


def judged_dicts():
    return {"train": dicts(), "test": dicts()}


def network(outputs):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))


def three():
    return network(3)


def two():
    return network(2)


def one():
    return network(1)


def words():
    return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 9))


def step(model, batch):
    return F.cross_entropy(F.dropout(model(batch["x"]), 0.1, model.training), batch["y"])


def metric(model, batch):
    assert not model.training
    return (model(batch["x"]).argmax(1) != batch["y"]).float().mean()
