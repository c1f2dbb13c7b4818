"""Learners of five components, with all that makes a run hard to repeat, and batches for them."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import plywise as pw
from plywise.local.cascaded_forward import GradientHead
from plywise.local.learner import StagedLearner

CLASSES, FEATURES, IMAGE, TOKENS = 3, 6, (2, 8, 8), 11


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1e-2)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)


def foof() -> pw.Foof:
    return pw.Foof(stats_every=2, refresh_every=4)


def dense(width_in: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ELU(), nn.Dropout(0.2))


def plain(width_in: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, width), nn.Tanh())


def mlp(make: Callable[[int, int], nn.Module] = dense, last: int = 16) -> pw.Blocks:
    widths = [FEATURES, 16, 12, 20, 16]
    blocks = [make(a, b) for a, b in pairwise(widths)]
    return pw.Blocks([*blocks, nn.Linear(widths[-1], last)], torch.zeros(2, FEATURES))


def convnet(
    memory: torch.memory_format = torch.contiguous_format, *, begin_in_place: bool = True
) -> pw.Blocks:
    blocks = [
        nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True)),
        nn.Sequential(
            nn.ReLU(inplace=begin_in_place), nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        ),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)),
        nn.Linear(48, CLASSES),
    ]
    return pw.Blocks([block.to(memory_format=memory) for block in blocks], torch.zeros(2, *IMAGE))


def token_blocks() -> tuple[pw.Blocks, nn.Embedding]:
    """An embedding and four blocks of features with dropout; heads may be tied to the embedding."""
    table = nn.Embedding(TOKENS, 8)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
    return pw.Blocks([table, *blocks], torch.zeros(2, 6, dtype=torch.long)), table


class MaskedLayer(nn.Module):
    """A layer that moves no position that its mask leaves out, and mixes none of these in."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.drop = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shown = torch.where(mask.unsqueeze(-1), x, 0.0)
        return x + self.drop(torch.tanh(self.map(shown + shown.mean(1, keepdim=True))))


class Looped(nn.Module):
    """A model that calls its layers in a loop and gives each of them a mask that is made of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, CLASSES)
        self.layers = nn.ModuleList(MaskedLayer() for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        scores: Tensor = self.head(x.mean(1))
        return scores


def make(kind: str) -> StagedLearner:
    """A learner of five components; the same one in every process."""
    torch.manual_seed(1)
    if kind == "associated":
        return pw.AssociatedLearning(mlp(), CLASSES, code=8, optimizer=adam, scheduler=decay, seed=3)
    if kind == "associated, Foof":
        return pw.AssociatedLearning(mlp(), CLASSES, code=8, optimizer=sgd, rule=foof, seed=3)
    if kind == "local":
        return pw.LocalLoss(mlp(last=CLASSES), CLASSES, optimizer=sgd, scheduler=decay, seed=3)
    if kind == "local, ProxProp":
        blocks = mlp(last=CLASSES)
        return pw.LocalLoss(blocks, CLASSES, optimizer=sgd, rule=lambda: pw.ProxProp(tau=1.0), seed=3)
    if kind == "local, carried":
        example = {"ids": torch.zeros(2, 6, dtype=torch.long), "mask": torch.ones(2, 6, dtype=torch.bool)}
        blocks = pw.split(Looped(), 5, example)
        return pw.LocalLoss(blocks, CLASSES, optimizer=adam, scheduler=decay, seed=3)
    if kind == "local, images":
        return pw.LocalLoss(convnet(torch.channels_last), CLASSES, optimizer=adam, seed=3)
    if kind.startswith("interlocking"):
        horizon = int(kind.split()[1])
        how = {"horizon": horizon, "optimizer": sgd, "scheduler": decay, "seed": 3}
        if kind.endswith("images"):
            # what a block has saved of its output must stay until the gradient comes back
            return pw.Interlocking(convnet(torch.channels_last, begin_in_place=False), CLASSES, **how)
        return pw.Interlocking(
            mlp(last=CLASSES), CLASSES, **how, rule=foof if kind.endswith("Foof") else None
        )
    if kind == "cascaded":
        return pw.CascadedForward(mlp(), CLASSES, seed=3)
    if kind == "next token, tied":
        blocks, table = token_blocks()
        return pw.LocalNextToken(blocks, TOKENS, tied=table, optimizer=adam, seed=3)
    if kind == "forward-forward":
        return pw.ForwardForward(mlp(), CLASSES, optimizer=adam, seed=3)
    if kind == "associated, plain":  # nothing in it depends on who shares a batch
        return pw.AssociatedLearning(mlp(plain), CLASSES, code=8, optimizer=sgd)
    if kind == "local, plain":
        return pw.LocalLoss(mlp(plain, CLASSES), CLASSES, optimizer=sgd, rule=foof)
    if kind == "cascaded, gradient":
        return pw.CascadedForward(mlp(plain), CLASSES, head=GradientHead, optimizer=sgd)
    raise KeyError(kind)


def batches(kind: str, count: int, rows: int = 16, last: int = 5) -> list[tuple[Any, Tensor]]:
    """Batches whose classes can be learned; the last one is odd."""
    generator = torch.Generator().manual_seed(5)
    if kind.startswith("next token"):
        sizes = [last if number == count - 1 else rows for number in range(count)]
        texts = [torch.randint(TOKENS, (size, 7), generator=generator) for size in sizes]
        return [(text[:, :-1], text[:, 1:]) for text in texts]
    if kind.endswith("carried"):
        sizes = [last if number == count - 1 else rows for number in range(count)]
        ids = [torch.randint(TOKENS, (size, 6), generator=generator) for size in sizes]
        return [({"ids": each, "mask": each > 2}, each[:, 0] % CLASSES) for each in ids]
    shape = IMAGE if kind.endswith("images") else (FEATURES,)
    made = []
    for number in range(count):
        x = torch.randn(last if number == count - 1 else rows, *shape, generator=generator)
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        made.append((x, x.flatten(1)[:, :CLASSES].argmax(1)))
    return made


def endless(kind: str) -> Iterator[tuple[Any, Tensor]]:
    while True:
        yield from batches(kind, 8)


def states(trainers: list[Any]) -> dict[str, Any]:
    """What these trainers know: weights, buffers, optimizers, schedulers, memories."""
    return {f"component {trainer.index}": trainer.state_dict() for trainer in trainers}


def difference(found: Any, wanted: Any, where: str = "") -> str:
    """The first place where two states differ in a bit; empty if there is none."""
    if isinstance(wanted, Tensor):
        same = found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{where}: {list(found)} instead of {list(wanted)}"
        return next(filter(None, (difference(found[k], wanted[k], f"{where}/{k}") for k in wanted)), "")
    elif isinstance(wanted, (list, tuple)):
        if len(found) != len(wanted):
            return f"{where}: {len(found)} instead of {len(wanted)}"
        pairs = enumerate(zip(found, wanted, strict=True))
        return next(filter(None, (difference(f, w, f"{where}/{i}") for i, (f, w) in pairs)), "")
    else:
        same = found == wanted
    return "" if same else f"{where}: {found} instead of {wanted}"


def alone(kind: str, data: list[tuple[Any, Tensor]]) -> StagedLearner:
    """The learner after these batches in one process."""
    learner = make(kind)
    for x, y in data:
        learner.step(x, y)
    return learner
