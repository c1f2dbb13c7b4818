"""Models and data, valid and broken, that a user might pass to `plywise bench`; the module `user`."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def one():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def flat():
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))


def image():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def words():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))


def narrow():
    return nn.Linear(3, 3)


def dead():
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, float("nan"))
    return layer


def fixed():
    return nn.Flatten()


def pair():
    return nn.LSTM(4, 3)


class Wordy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return ["a word"] * len(x)


def wordy():
    return Wordy()


def boom():
    raise ValueError("not today")


shared = net()


def same():
    return shared


number = 3
instance = nn.Linear(4, 3)

x = torch.arange(400.0, dtype=torch.float64).view(100, 4)
y = torch.arange(100) % 3


def data():
    return x.numpy(), y.numpy()


def lists():
    return x.tolist(), y.tolist()


def four():
    return x, y, x[:7] + 0.5, y[:7]


def three():
    return (x, y), (x[:5] + 0.25, y[:5]), [x[:6] + 0.5, y[:6]]


def dataset():
    return TensorDataset(x, y)


class Slow(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return np.full(4, i, np.float32), int(i % 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Bare(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.zeros(4)


def two_datasets():
    return Slow(90), Slow(8)


def mixed():
    return Slow(30), (x[:5].float(), y[:5]), TensorDataset(x[:6], y[:6])


def stream():
    return Stream()


def bare():
    return Bare()


def images():
    return np.full((40, 3, 2, 2), 255, np.uint8), np.arange(40) % 3


def tokens():
    t = torch.arange(330).view(30, 11) % 9
    return t[:, :-1], t[:, 1:]


def numbers():
    return x / 400, x[:, 0] / 400


def one_hot():
    return x / 400, nn.functional.one_hot(y).float()


def column():
    return x / 400, x[:, :1] / 400


def holes():
    z = x.clone()
    z[3, 2] = float("nan")
    z[9] = float("inf")
    return z, y


def target_holes():
    return x, [0.5] * 99 + [float("nan")]


def unequal():
    return x, y[:-1]


def empty():
    return x[:0], y[:0]


def few():
    return x[:9], y[:9]


def other_shape():
    return x, y, x[:, :3], y


def other_kind():
    return x, y, x, y.float()


def negative():
    return x, y - 1


def columns():
    return x, y.unsqueeze(1)


def high():
    return x, y + 1


def giant():
    return x, [0, 1, 10**12, *y.tolist()[3:]]


def words_as_x():
    return ["a"] * 20, [0] * 20


def ragged():
    return [[1.0, 2.0], [1.0]] * 10, [0] * 20


def five():
    return 1, 2, 3, 4, 5


def nothing():
    return None


def l1(output, target):
    return (output - target).abs().mean()


def rows(output, target):
    return (output - target).abs()


def broken(output, target):
    raise KeyError("weights")


def endless(output, target):
    return output.sum() / 0 * float("inf")


def smoothed(output, target):
    return nn.functional.cross_entropy(output, target, label_smoothing=0.1)


def confidence(output, target):
    return 1 - output.softmax(1).gather(1, target[:, None]).mean()
