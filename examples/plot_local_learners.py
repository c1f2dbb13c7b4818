"""
Local learners: training without a backward pass through the network
====================================================================

This example trains the same three blocks on the same batches of digits with each of plywise's local learners,
and with backpropagation. All of them use Adam with one learning rate, which was not tuned. The example shows
how to create and call the learners; it is not a ranking. For a ranking, tune each method
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


def make_adam(parameters):
    return torch.optim.Adam(parameters, lr=RATE)


# %%
# Some learners predict the class from every block; for the others, the last block is the classifier.


def make_blocks():
    """Make three blocks of 96 units."""
    return [nn.Sequential(nn.Linear(n, 96), nn.ReLU()) for n in (64, 96, 96)]


def make_classifier(kind, **settings):
    """Make a learner whose last block is the classifier."""
    return kind(
        pw.Blocks([*make_blocks(), nn.Linear(96, 10)], x[:2]), num_classes=10, optimizer=make_adam, **settings
    )


def make_block_reader(kind, **settings):
    """Make a learner that predicts the class from its blocks."""
    return kind(pw.Blocks(make_blocks(), x[:2]), num_classes=10, optimizer=make_adam, **settings)


def make_for_any_loss(kind, **settings):
    """Make a learner that needs no classes, only a loss of the last block's output."""
    return kind(pw.Blocks([*make_blocks(), nn.Linear(96, 10)], x[:2]), optimizer=make_adam, **settings)


MAKERS = {
    "LocalLoss": partial(make_classifier, pw.LocalLoss),
    "Interlocking": partial(make_classifier, pw.Interlocking, horizon=2),
    "MomentumAuxiliary": partial(make_classifier, pw.MomentumAuxiliary),
    "SCPL": partial(make_classifier, pw.SCPL),
    "AssociatedLearning": partial(make_block_reader, pw.AssociatedLearning, code=40),
    "MonoForward": partial(make_block_reader, pw.MonoForward),
    "ForwardForward": partial(make_block_reader, pw.ForwardForward),
    "CascadedForward": partial(make_block_reader, pw.CascadedForward),
    "DirectFeedback": partial(make_for_any_loss, pw.DirectFeedback),
    "ActivationRelaxation": partial(make_for_any_loss, pw.ActivationRelaxation, rate=0.5, iterations=20),
    "LocalForwardGradient": partial(make_classifier, pw.LocalForwardGradient),
    "backpropagation": partial(make_classifier, pw.Interlocking, horizon=4),  # gradients through all blocks
}

# %%
# All learners train on the same batches.

accuracy = {}
for name, make in MAKERS.items():
    torch.manual_seed(0)
    learner = make()
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        learner.step(x[rows], train.y[rows])
    correct = learner.predict(x_test).argmax(1) == test.y
    accuracy[name] = 100 * correct.float().mean().item()
    print(f"{name:22} {accuracy[name]:.1f} % of the test digits")

# %%
# The test accuracy with the same learning rate for all.

figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
names = sorted(accuracy, key=accuracy.get)
colours = ["black" if name == "backpropagation" else "#1f5fa8" for name in names]
axis.barh(names, [accuracy[name] for name in names], color=colours)
axis.set(xlabel="test accuracy, %", title=f"Digits after {STEPS} steps of Adam at {RATE:g}, untuned")
plt.show()
