"""
Associated Learning: no gradient between blocks
===============================================

Each block of ``plywise.AssociatedLearning`` learns to carry its input to a code of the label, by a loss of
its own; no gradient crosses from one block to another. A sample is classified by its code, read back
through the label's side. The picture shows the loss of each block while it learns, and the accuracy beside
backpropagation's. After `"Associated Learning" <https://arxiv.org/abs/1906.05560>`_ (Kao and Chen, 2021).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, EVERY = 300, 15
train, validation, _ = load_digits()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def blocks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(inputs, 96), nn.ReLU()) for inputs in (64, 96, 96)]


# %%
# The same batches for both.

learner = pw.AssociatedLearning(pw.Blocks(blocks(), train.x[:2]), 10, code=40, optimizer=adam)
plain = nn.Sequential(*blocks(), nn.Linear(96, 10))
optimizer = adam(plain.parameters())
losses, right = [], {"Associated Learning": [], "backpropagation": []}
for step in range(STEPS):
    rows = torch.randint(len(train.x), (64,))
    losses.append(learner.step(train.x[rows], train.y[rows]))
    optimizer.zero_grad()
    nn.functional.cross_entropy(plain(train.x[rows]), train.y[rows]).backward()
    optimizer.step()
    if step % EVERY == EVERY - 1:
        for name, predict in zip(right, (learner.predict, plain), strict=True):
            right[name].append(100 * (predict(validation.x).argmax(1) == validation.y).float().mean().item())
print({name: f"{values[-1]:.1f} % of the validation digits" for name, values in right.items()})

# %%
# Left: the losses of the blocks. Right: accuracy.

figure, (left, both) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.plot(torch.stack(losses), label=[f"block {number}" for number in range(1, len(losses[0]) + 1)])
left.set(yscale="log", xlabel="steps", ylabel="loss of a block", title="Losses of their own")
for name, values in right.items():
    both.plot(range(EVERY, STEPS + 1, EVERY), values, label=name)
both.set(xlabel="steps", ylabel="validation accuracy, %", title="Digits")
for axis in (left, both):
    axis.legend()
plt.show()
