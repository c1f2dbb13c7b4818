"""
Associated Learning: no gradient between blocks
===============================================

This example trains a classifier with ``plywise.AssociatedLearning`` and compares it with backpropagation.
Each block has its own loss and learns to map its input to a code of the label; no gradient crosses from one
block to another. To classify a sample, the learner decodes its code into a label. The left plot shows the
loss of each block during training, the right plot the accuracy of both methods. After `"Associated Learning"
<https://arxiv.org/abs/1906.05560>`_ (Kao and Chen, 2021).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, EVERY = 300, 15
train, validation, _ = load_digits()


def make_adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def make_blocks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(inputs, 96), nn.ReLU()) for inputs in (64, 96, 96)]


# %%
# Both methods get the same batches.

learner = pw.AssociatedLearning(pw.Blocks(make_blocks(), train.x[:2]), 10, code=40, optimizer=make_adam)
plain = nn.Sequential(*make_blocks(), nn.Linear(96, 10))
optimizer = make_adam(plain.parameters())
losses, accuracies = [], {"Associated Learning": [], "backpropagation": []}
for step in range(STEPS):
    rows = torch.randint(len(train.x), (64,))
    losses.append(learner.step(train.x[rows], train.y[rows]))
    optimizer.zero_grad()
    nn.functional.cross_entropy(plain(train.x[rows]), train.y[rows]).backward()
    optimizer.step()
    if step % EVERY == EVERY - 1:
        for name, predict in zip(accuracies, (learner.predict, plain), strict=True):
            accuracies[name].append(
                100 * (predict(validation.x).argmax(1) == validation.y).float().mean().item()
            )
print({name: f"{values[-1]:.1f} % of the validation digits" for name, values in accuracies.items()})

# %%
# The losses of the blocks (left), and the accuracy of both methods (right).

figure, (loss_axis, accuracy_axis) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
loss_axis.plot(torch.stack(losses), label=[f"block {number}" for number in range(1, len(losses[0]) + 1)])
loss_axis.set(yscale="log", xlabel="steps", ylabel="loss of a block", title="Each block has its own loss")
for name, values in accuracies.items():
    accuracy_axis.plot(range(EVERY, STEPS + 1, EVERY), values, label=name)
accuracy_axis.set(xlabel="steps", ylabel="validation accuracy, %", title="Digits")
for axis in (loss_axis, accuracy_axis):
    axis.legend()
plt.show()
