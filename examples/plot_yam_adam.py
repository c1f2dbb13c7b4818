"""
YamAdam, which has no learning rate
===================================

YamAdam takes the length of a step from the steps before, and so there is nothing to tune. What would tuning
have won? The picture shows the accuracy on the digits after the same number of steps: Adam at each of eight
learning rates, and YamAdam as a line. Where Adam's curve is above the line tuning pays, and where it is
below a wrong guess costs.
"""

# %%
# A small network on the digits; 300 steps, three seeds.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from plywise.data.digits import load_digits
from plywise.optim import YamAdam

torch.set_num_threads(1)
train, _, test = load_digits()


def accuracy(make, seed, steps=300, batch=50):
    """Share of the test part that is right after training."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = make(model.parameters())
    for _ in range(steps):
        rows = torch.randint(len(train.x), (batch,))
        optimizer.zero_grad()
        cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(test.x).argmax(1) == test.y).double().mean().item()


def mean_accuracy(make):
    """The mean of three seeds, in percent."""
    return 100 * sum(accuracy(make, seed) for seed in range(3)) / 3


# %%
# YamAdam runs once, Adam once for every rate.

ours = mean_accuracy(YamAdam)
print(f"YamAdam         {ours:.1f} %")
rates = [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0]
adam = []
for rate in rates:
    adam.append(mean_accuracy(lambda params, rate=rate: torch.optim.Adam(params, lr=rate)))
    print(f"Adam lr={rate:<7g} {adam[-1]:.1f} %")

# %%
# What a rate is worth.

figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axes.semilogx(rates, adam, "o-", label="Adam, by learning rate")
axes.axhline(ours, color="C1", label="YamAdam, no rate")
axes.set(xlabel="learning rate", ylabel="test accuracy after 300 steps, %")
axes.legend(loc="lower center")
plt.show()
