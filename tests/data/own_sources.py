"""Data of every form that a user's function may return, of the same 60 samples; the module `mine`."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, IterableDataset

LENGTHS = torch.arange(60) % 4 + 3
IDS = torch.arange(60 * 6).view(60, 6) % 10
MASK = (torch.arange(6) < LENGTHS[:, None]).long()
LABELS = torch.arange(60) % 3


@dataclass
class Batch:
    ids: torch.Tensor
    mask: torch.Tensor
    y: torch.Tensor


class Samples(Dataset):
    def __init__(self, ragged=False):
        self.ragged = ragged

    def __len__(self):
        return 60

    def __getitem__(self, i):
        end = int(LENGTHS[i]) if self.ragged else 6
        return {"ids": IDS[i, :end], "attention_mask": MASK[i, :end], "labels": int(LABELS[i])}


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(60):
            yield IDS[i], LABELS[i]


def collate(samples):
    longest = max(len(sample["ids"]) for sample in samples)
    fill = lambda name: torch.stack([pad(s[name], (0, longest - len(s[name]))) for s in samples])  # noqa: E731
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {
        "ids": fill("ids"),
        "attention_mask": fill("attention_mask"),
        "labels": labels,
        "text": ["a"] * len(samples),
    }


def mapping():
    return {"ids": IDS.numpy(), "attention_mask": MASK, "labels": LABELS}


def nested():
    return (IDS, MASK), LABELS


def samples():
    return Samples()


def ragged_samples():
    return Samples(ragged=True)


def loader():
    return DataLoader(Samples(ragged=True), 5, collate_fn=collate)


def named():
    return {"train": loader(), "val": Samples(), "test": mapping()}


def loaders():
    return {"train": loader(), "validation": loader(), "test": loader()}


def stream():
    return Stream()


def endless():
    place = 0
    while True:
        rows = torch.arange(place, place + 5) % 60
        yield IDS[rows], LABELS[rows]
        place += 5


def batches():
    return [(IDS[i : i + 5], MASK[i : i + 5], LABELS[i : i + 5]) for i in range(0, 60, 5)].__iter__()


def classes_of_batches():
    for i in range(0, 60, 5):
        yield Batch(IDS[i : i + 5], MASK[i : i + 5], LABELS[i : i + 5])


def inputs_only():
    return iter([IDS[:5], IDS[5:10]])


def holes():
    yield IDS[:5], LABELS[:5]
    yield IDS[:5].float() / 0, LABELS[:5]


def other_length():
    yield IDS[:5], LABELS[:4]


def other_names():
    return {"training": Samples()}


def no_training():
    return {"test": Samples()}


def first_tokens():
    return IDS, torch.where(LENGTHS > 4, IDS[:, 0], -100)


def token_targets():
    return IDS, torch.where(MASK.bool(), IDS, -100)


def breaking():
    yield IDS[:20], LABELS[:20]
    raise OSError("the disk is gone.")


class Breaking(Samples):
    def __getitem__(self, index):
        if index == 2:
            raise ValueError("no such picture")
        return super().__getitem__(index)


def breaking_samples():
    return Breaking()
