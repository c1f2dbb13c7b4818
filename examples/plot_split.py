"""
Cut a model and train its parts alone
=====================================

``plywise.split`` cuts an ordinary network into blocks, and ``plywise.LocalLoss`` gives each block a small
head and a loss of its own. A block's graph is freed before the next block begins, so that what is kept for
backward does not grow with depth. The picture shows the bytes that autograd keeps at once, over depth.
After `Belilovsky et al. <https://arxiv.org/abs/1901.08164>`_ (2020).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

DEPTHS, train = (2, 4, 8, 16), load_digits()[0]


class Kept:
    """A tensor that a graph keeps for backward; the bytes of all are counted."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes


def count_kept(step):
    Kept.now = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        for rows in torch.randint(len(train.x), (10, 256)):
            step(train.x[rows], train.y[rows])
    return Kept.most / 2**20


# %%
# ``Interlocking`` over all blocks is backpropagation: gradients cross every border.
WAYS = {
    "backpropagation": lambda blocks: pw.Interlocking(blocks, 10, optimizer=torch.optim.AdamW, horizon=16),
    "LocalLoss": lambda blocks: pw.LocalLoss(blocks, 10, optimizer=torch.optim.AdamW),
}
figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, make in WAYS.items():
    peaks = []
    for depth in DEPTHS:
        layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(depth)]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
        peaks.append(count_kept(make(pw.split(model, depth, train.x[:2])).step))
    print(f"{name:16}", "  ".join(f"{value:.2f} MiB" for value in peaks))
    axis.plot(DEPTHS, peaks, "o-", label=name)
axis.set(xlabel="hidden layers, a block each", ylabel="MiB kept for backward", ylim=(0, None))
axis.legend()
plt.show()
