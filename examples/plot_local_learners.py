"""
Eleven ways to learn without a backward pass through the network
================================================================

The same three blocks and the same batches of digits, trained by each of plywise's local learners and by
backpropagation, all on Adam at one rate that nobody tuned. This is a picture of how they are made and called,
not a ranking: for that, tune each one
(``plywise bench --workloads digits-mlp --methods sgd,local-loss,scpl``).
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn

import plywise as pw
from plywise.data.digits import load_digits

STEPS, RATE = 150, 3e-3
train, _, test = load_digits()
mean, spread = train.x.mean(), train.x.std()
x, x_test = (train.x - mean) / spread, (test.x - mean) / spread


def adam(parameters):
    return torch.optim.Adam(parameters, lr=RATE)


# %%
# Some learners read the classes off every block; for the others, the last block is the classifier.


def body():
    """Three blocks of 96 units."""
    return [nn.Sequential(nn.Linear(n, 96), nn.ReLU()) for n in (64, 96, 96)]


def classifying(kind, **settings):
    """A learner whose last block makes the scores."""
    return kind(pw.Blocks([*body(), nn.Linear(96, 10)], x[:2]), num_classes=10, optimizer=adam, **settings)


def reading(kind, **settings):
    """A learner that reads the classes off the blocks."""
    return kind(pw.Blocks(body(), x[:2]), num_classes=10, optimizer=adam, **settings)


def of_any_loss(kind, **settings):
    """A learner that needs no classes, only a loss of the last block's output."""
    return kind(pw.Blocks([*body(), nn.Linear(96, 10)], x[:2]), optimizer=adam, **settings)


MAKERS = {
    "LocalLoss": partial(classifying, pw.LocalLoss),
    "Interlocking": partial(classifying, pw.Interlocking, horizon=2),
    "MomentumAuxiliary": partial(classifying, pw.MomentumAuxiliary),
    "SCPL": partial(classifying, pw.SCPL),
    "AssociatedLearning": partial(reading, pw.AssociatedLearning, code=40),
    "MonoForward": partial(reading, pw.MonoForward),
    "ForwardForward": partial(reading, pw.ForwardForward),
    "CascadedForward": partial(reading, pw.CascadedForward),
    "DirectFeedback": partial(of_any_loss, pw.DirectFeedback),
    "ActivationRelaxation": partial(of_any_loss, pw.ActivationRelaxation, rate=0.5, iterations=20),
    "LocalForwardGradient": partial(classifying, pw.LocalForwardGradient),
    "backpropagation": partial(classifying, pw.Interlocking, horizon=4),  # gradients through all blocks
}

# %%
# Each trains on the same batches.

accuracy = {}
for name, make in MAKERS.items():
    torch.manual_seed(0)
    learner = make()
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        learner.step(x[rows], train.y[rows])
    right = learner.predict(x_test).argmax(1) == test.y
    accuracy[name] = 100 * right.float().mean().item()
    print(f"{name:22} {accuracy[name]:.1f} % of the test digits")

# %%
# Test accuracy, the same rate for all.

figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
names = sorted(accuracy, key=accuracy.get)
colours = ["black" if name == "backpropagation" else "#1f5fa8" for name in names]
axis.barh(names, [accuracy[name] for name in names], color=colours)
axis.set(xlabel="test accuracy, %", title=f"Digits after {STEPS} steps of Adam at {RATE:g}, untuned")
plt.show()
