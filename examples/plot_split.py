"""
Splitting a model and training its blocks separately
====================================================

This example measures the memory that autograd keeps for backward, over depth: with backpropagation, and with
blocks that are trained separately. ``plywise.split`` splits an ordinary network into blocks, and
``plywise.LocalLoss`` gives each block a small head and its own loss. The graph of a block is freed before the
next block starts, so the memory does not grow with depth. After `Belilovsky et al.
<https://arxiv.org/abs/1901.08164>`_ (2020).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

DEPTHS, train = (2, 4, 8, 16), load_digits()[0]


class SavedTensor:
    """A tensor that a graph saves for backward; the class counts the bytes of all of them."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        SavedTensor.now += tensor.nbytes
        SavedTensor.peak = max(SavedTensor.peak, SavedTensor.now)

    def __del__(self):
        SavedTensor.now -= self.tensor.nbytes


def measure_saved_mib(step):
    SavedTensor.now = SavedTensor.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda saved: saved.tensor):
        for rows in torch.randint(len(train.x), (10, 256)):
            step(train.x[rows], train.y[rows])
    return SavedTensor.peak / 2**20


# %%
# ``Interlocking`` over all blocks is backpropagation: gradients cross all boundaries between blocks.
METHODS = {
    "backpropagation": lambda blocks: pw.Interlocking(blocks, 10, optimizer=torch.optim.AdamW, horizon=16),
    "LocalLoss": lambda blocks: pw.LocalLoss(blocks, 10, optimizer=torch.optim.AdamW),
}
figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, make in METHODS.items():
    peaks = []
    for depth in DEPTHS:
        layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(depth)]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
        peaks.append(measure_saved_mib(make(pw.split(model, depth, train.x[:2])).step))
    print(f"{name:16}", "  ".join(f"{value:.2f} MiB" for value in peaks))
    axis.plot(DEPTHS, peaks, "o-", label=name)
axis.set(xlabel="hidden layers (one per block)", ylabel="MiB saved for backward", ylim=(0, None))
axis.legend()
plt.show()
