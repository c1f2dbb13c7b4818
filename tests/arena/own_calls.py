"""One model that is called in many ways, and data for each; the module `calls`."""

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Output = namedtuple("Output", "hidden logits")
Parts = namedtuple("Parts", "x mask y")
generator = torch.Generator().manual_seed(0)
X = torch.randn(120, 5, 4, generator=generator)
MASK = (torch.rand(120, 5, generator=generator) > 0.3).long()
MASK[:, 0] = 1
Y = ((X.sum(2) * MASK).sum(1) > 0).long()
WEIGHTS = {}


@dataclass
class Given:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Pooled(nn.Module):
    """Returns class scores of the mean over positions, in the form ``gives``."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, attention_mask=None, labels=None):
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        hidden = torch.relu(self.first(x)) * mask.unsqueeze(2)
        logits = self.last(hidden.sum(1) / mask.sum(1, keepdim=True))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        given = {
            "tensor": logits,
            "dict": {"hidden": hidden, "logits": logits},
            "tuple": (logits, hidden),
            "named": Output(hidden, logits),
            "dataclass": Given(loss, logits),
            "loss": loss,
            "loss first": (loss, logits),
        }
        return given[self.gives]


def makes(gives):
    return lambda: Pooled(gives)


tensor, mapping, pair, named = makes("tensor"), makes("dict"), makes("tuple"), makes("named")
own, bare, loss_first = makes("dataclass"), makes("loss"), makes("loss first")


def dicts():
    return {"x": X, "attention_mask": MASK, "labels": Y}


def padded():
    more = lambda t: F.pad(t, (0, 0) * (t.dim() - 2) + (0, 40))  # noqa: E731
    return {"x": more(X), "attention_mask": more(MASK), "labels": Y}


def pairs():
    return (X, MASK), Y


def single():
    return X, Y


def loader():
    return DataLoader(TensorDataset(X, MASK, Y), 12)


def step(model, batch):
    x, mask, y = batch
    output = model(x, mask)
    return F.cross_entropy(output["logits"] if isinstance(output, dict) else output, y)


def metric(model, batch):
    return (model(*batch[:2]).argmax(1) != batch[2]).float().mean()


def named_step(model, batch):
    return F.cross_entropy(model(batch.x, batch.mask), batch.y)


def named_batches():
    for i in range(0, 120, 12):
        rows = slice(i, i + 12)
        yield Parts(X[rows], MASK[rows], Y[rows])


def no_number(model, batch):
    return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")


def no_graph(model, batch):
    return step(model, batch).detach()


def no_end(model, batch):
    return step(model, batch) / 0


def broken(model, batch):
    return model(batch["x"])


def squares(output, y):
    return (output - F.one_hot(y, 2)).square().mean()


def triples():
    return iter([(X[i : i + 2], MASK[i : i + 2], Y[i : i + 2]) for i in range(0, 120, 2)])


def other_names():
    return {"ids": X, "words": MASK, "labels": Y}


def step_of_pairs(model, batch):
    return F.cross_entropy(model(*batch[:2]), batch[2])


def metric_of_pairs(model, batch):
    return (model(*batch[:2]).argmax(1) != batch[2]).float().mean()
