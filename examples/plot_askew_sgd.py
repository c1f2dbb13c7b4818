"""
ASkewSGD: weights that find their way to plus or minus one
==========================================================

A network for the digits whose weights may be -1 or 1 only. ASkewSGD lets them train freely at first, then
narrows the intervals around the two levels; weights outside are led in and never rounded, but for a last
small step. The left picture shows the way of some weights. The right one compares free weights with three
ways to two-valued ones: rounding a trained network, ASkewSGD without its hold, and ASkewSGD. Without the
hold weights stay on the side where they began.
"""

# %%
# A layer's sums are scaled by its number of inputs, so that weights of size 1 are right. Biases are free.

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
        """Rows of outputs."""
        return linear(rows, 3 * self.weight / self.in_features**0.5, self.bias)


def accuracy(model):
    """Of the test part, in percent."""
    with torch.no_grad():
        return 100 * (model(test.x).argmax(1) == test.y).double().mean().item()


def run(hold, seed):
    """Accuracy before and after the weights are quantized, and some weights by epoch."""
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
# A hold as long as the run is plain SGD; rounding its weights is the simplest way to quantize. Three seeds.


def several(hold):
    """Means over three seeds, and the weights of the first."""
    runs = [run(hold, seed) for seed in range(3)]
    return sum(r[0] for r in runs) / 3, sum(r[1] for r in runs) / 3, runs[0][2]


free, rounded, _ = several(hold=EPOCHS)
_, at_once, _ = several(hold=0)
annealed, quantized, paths = several(hold=HOLD)
print(f"SGD, free weights         {free:.1f} %")
print(f"SGD, rounded at the end   {rounded:.1f} %")
print(f"ASkewSGD without a hold   {at_once:.1f} %")
print(f"ASkewSGD                  {quantized:.1f} % (before the last step to the levels: {annealed:.1f} %)")

# %%
# Feasible is (w² − 1)² ≤ ε: beyond the dashed lines, which are those of the epoch before.

figure, (way, bars) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(3, 2))
way.plot(paths, color="C0", linewidth=0.6, alpha=0.6)
epsilon = DECAY ** (torch.arange(EPOCHS) - 1 - HOLD).clamp(min=0)
edge = (1 - epsilon.sqrt()).sqrt()
way.plot(edge, "k--", linewidth=1.4, label="edge of the intervals")
way.plot(-edge, "k--", linewidth=1.4)
way.set(xlabel="epoch", ylabel="weight", title="some weights under ASkewSGD")
way.legend(loc="lower left")
names = ["free", "rounded", "no hold", "ASkewSGD"]
shown = bars.bar(names, [free, rounded, at_once, quantized], color=["0.7", "C1", "C2", "C0"])
bars.bar_label(shown, fmt="%.1f")
bars.set(ylabel="test accuracy, %", ylim=(0, 105), title="free, and three ways to -1 and 1")
plt.show()
