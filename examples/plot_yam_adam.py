"""
YamAdam: an optimizer without a learning rate
=============================================

This example compares YamAdam with Adam at eight learning rates. YamAdam computes the length of a step from
the previous steps, so it has no rate to tune. The plot shows the accuracy on digits after the same number of
steps. Where the curve of Adam is above the line of YamAdam, tuning pays; where it is below, a wrong learning
rate is worse than none.
"""

# %%
# A small network trains on digits for 300 steps, with three seeds.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from plywise.data.digits import load_digits
from plywise.optim import YamAdam

torch.set_num_threads(1)
train, _, test = load_digits()


def measure_accuracy(make, seed, steps=300, batch=50):
    """Train, and return the accuracy on the test part."""
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


def average_accuracy(make):
    """Return the mean accuracy of three seeds, in percent."""
    return 100 * sum(measure_accuracy(make, seed) for seed in range(3)) / 3


# %%
# YamAdam runs once, Adam once for each rate.

yam_adam = average_accuracy(YamAdam)
print(f"YamAdam         {yam_adam:.1f} %")
rates = [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0]
adam = []
for rate in rates:
    adam.append(average_accuracy(lambda params, rate=rate: torch.optim.Adam(params, lr=rate)))
    print(f"Adam lr={rate:<7g} {adam[-1]:.1f} %")

# %%
# The accuracy of Adam over its learning rate, and that of YamAdam.

figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axes.semilogx(rates, adam, "o-", label="Adam, by learning rate")
axes.axhline(yam_adam, color="C1", label="YamAdam (no rate)")
axes.set(xlabel="learning rate", ylabel="test accuracy after 300 steps, %")
axes.legend(loc="lower center")
plt.show()
