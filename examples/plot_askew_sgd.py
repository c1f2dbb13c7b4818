"""
ASkewSGD: training weights that end at -1 or 1
==============================================

This example trains a classifier of digits whose final weights are all -1 or 1. ASkewSGD first trains the
weights without constraints, then narrows the allowed intervals around the two levels. It pushes weights that
are outside into the intervals, and rounds only at the end, by a small amount. The left plot shows some
weights during training. The right plot compares unconstrained weights with three kinds of two-valued weights:
a trained network that is rounded, ASkewSGD without the unconstrained phase (its ``hold``), and ASkewSGD.
Without this phase, weights keep the sign of their initial value.
"""

# %%
# Each layer scales its sums by its number of inputs, since weights of size 1 would otherwise make them too
# large. Biases are not constrained.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy, linear

from plywise.data.digits import load_digits
from plywise.optim import ASkewSGD

torch.set_num_threads(1)
train, _, test = load_digits()
EPOCHS, HOLD, DECAY, BATCH = 40, 15, 0.8, 50
EPOCH = len(train.x) // BATCH


class Scaled(torch.nn.Linear):
    """A linear layer for weights of size 1."""

    def forward(self, rows):
        """Return the outputs, one row per sample."""
        return linear(rows, 3 * self.weight / self.in_features**0.5, self.bias)


def accuracy(model):
    """Return the accuracy on the test part, in percent."""
    with torch.no_grad():
        return 100 * (model(test.x).argmax(1) == test.y).double().mean().item()


def run(hold, seed):
    """Return the accuracy before and after quantization, and some weights per epoch."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(Scaled(64, 32), torch.nn.ReLU(), Scaled(32, 10))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    for weight in weights:
        torch.nn.init.uniform_(weight, -0.1, 0.1)
    groups = [{"params": weights}, {"params": biases, "levels": None, "lr": 0.1}]
    optimizer = ASkewSGD(groups, lr=2.0, alpha=0.2, steps_per_epoch=EPOCH, hold=hold, decay=DECAY)
    paths = []
    for _ in range(EPOCHS):
        paths.append(weights[0].detach().flatten()[5::31].clone())
        for rows in torch.randint(len(train.x), (EPOCH, BATCH)):
            optimizer.zero_grad()
            cross_entropy(model(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
    before = accuracy(model)
    optimizer.quantize()
    return before, accuracy(model), torch.stack(paths)


# %%
# With a hold as long as the run, ASkewSGD is plain SGD; rounding its weights is the simplest way to quantize.
# Each run has three seeds.


def run_seeds(hold):
    """Return the mean accuracies of three seeds, and the weights of the first seed."""
    runs = [run(hold, seed) for seed in range(3)]
    return sum(r[0] for r in runs) / 3, sum(r[1] for r in runs) / 3, runs[0][2]


free, rounded, _ = run_seeds(hold=EPOCHS)
_, without_hold, _ = run_seeds(hold=0)
annealed, quantized, paths = run_seeds(hold=HOLD)
print(f"SGD, unconstrained        {free:.1f} %")
print(f"SGD, rounded at the end   {rounded:.1f} %")
print(f"ASkewSGD without a hold   {without_hold:.1f} %")
print(f"ASkewSGD                  {quantized:.1f} % (before the final rounding: {annealed:.1f} %)")

# %%
# A weight is allowed if (w² − 1)² ≤ ε, which is outside the dashed lines. The lines show the intervals of the
# previous epoch.

figure, (weight_axis, accuracy_axis) = plt.subplots(
    1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(3, 2)
)
weight_axis.plot(paths, color="C0", linewidth=0.6, alpha=0.6)
epsilon = DECAY ** (torch.arange(EPOCHS) - 1 - HOLD).clamp(min=0)
edge = (1 - epsilon.sqrt()).sqrt()
weight_axis.plot(edge, "k--", linewidth=1.4, label="edge of the intervals")
weight_axis.plot(-edge, "k--", linewidth=1.4)
weight_axis.set(xlabel="epoch", ylabel="weight", title="some weights under ASkewSGD")
weight_axis.legend(loc="lower left")
names = ["unconstrained", "rounded", "no hold", "ASkewSGD"]
bars = accuracy_axis.bar(names, [free, rounded, without_hold, quantized], color=["0.7", "C1", "C2", "C0"])
accuracy_axis.bar_label(bars, fmt="%.1f")
accuracy_axis.set(ylabel="test accuracy, %", ylim=(0, 105), title="unconstrained, and with weights -1 and 1")
plt.show()
