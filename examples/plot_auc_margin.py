"""
AUC maximisation for a rare class
=================================

This example trains a detector of the digit eight, which is one in fifty of the training digits. It compares
two equal networks: one minimises the cross-entropy of each sample, the other `AUCMargin`, which makes eights
score higher than other digits. The parameters a and b of this loss follow the mean scores of both classes;
the loss is maximised over its dual variable α while it is minimised over the weights. The measure is the area
under the ROC curve (AUC) on test digits, a tenth of which are eights, over several seeds.
"""

# %%
# The training set has 20 eights and all other digits. `positive_share` tells the loss how rare eights are;
# with it the loss accepts batches of any composition, also those without an eight.

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.losses import AUCMargin
from plywise.losses.spauc import roc_auc

torch.set_num_threads(1)
EIGHTS, STEPS, SEEDS = 20, 600, 6


def load_data(seed):
    train, validation, test = load_digits(seed)
    y = train.y == 8
    selected = ~y | (y.cumsum(0) <= EIGHTS)
    return (
        train.x[selected],
        y[selected],
        torch.cat([validation.x, test.x]),
        torch.cat([validation.y, test.y]) == 8,
    )


# %%
# The AUC margin loss is an ordinary module with three parameters. The optimizer gets them together with those
# of the network. The loss reverses the sign of α's gradient: a descent step of the optimizer is an ascent
# step for α.


def train(make_loss, rate, seed):
    x, y, x_test, y_test = load_data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    loss = make_loss(y.float().mean().item())
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=rate, momentum=0.9)
    aucs, history = [], []
    for step in range(STEPS + 1):
        if step % 25 == 0:
            with torch.no_grad():
                aucs.append(roc_auc(model(x_test).squeeze(1), y_test))
            history.append([parameter.item() for parameter in loss.parameters()])
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        loss(model(x[rows]).squeeze(1), y[rows].float()).backward()
        optimizer.step()
    return aucs, history


# %%
# The learning rates were chosen on three other seeds, from 0.03 to 1 for the cross-entropy and from 0.001 to
# 0.1 for `AUCMargin`, which needs smaller rates: at 0.03 and more it gave all samples the same score.

methods = {
    "cross-entropy": (lambda share: nn.BCEWithLogitsLoss(), 0.3),
    "AUCMargin": (lambda share: AUCMargin(positive_share=share), 0.003),
}
runs = {name: [train(*method, seed) for seed in range(SEEDS)] for name, method in methods.items()}
for name, pairs in runs.items():
    final = torch.tensor([aucs[-1] for aucs, _ in pairs])
    print(f"{name}: AUC on test digits {final.mean():.4f}, from {final.min():.4f} to {final.max():.4f}")
a, b, alpha = runs["AUCMargin"][0][1][-1]
print(f"AUCMargin, first seed, trained: a = {a:.3f}, b = {b:.3f}, alpha = {alpha:.3f}")

# %%
# The left plot shows the AUC during training: thin lines are seeds, thick lines their means. The right plot
# shows the three parameters of one run. The mean scores of eights and of other digits move apart. α first
# grows, since their difference is smaller than the margin, and falls as the difference approaches it.

figure, (auc_axis, parameter_axis) = plt.subplots(1, 2, figsize=(10, 4))
steps = range(0, STEPS + 1, 25)
for color, (name, pairs) in zip(("C0", "C1"), runs.items(), strict=True):
    curves = torch.tensor([aucs for aucs, _ in pairs])
    auc_axis.plot(steps, curves.T, color=color, alpha=0.25, linewidth=0.8)
    auc_axis.plot(steps, curves.mean(0), color=color, linewidth=2.5, label=name)
auc_axis.set(
    xlabel="step",
    ylabel="AUC on 697 test digits",
    ylim=(0.8, 1.0),
    title=f"{EIGHTS} eights in the training set",
)
auc_axis.legend(loc="lower right")
history = torch.tensor(runs["AUCMargin"][0][1])
for values, name in zip(
    history.T, ("a: follows the eights", "b: follows the others", "α, ascending"), strict=True
):
    parameter_axis.plot(steps, values, label=name)
parameter_axis.set(xlabel="step", title="the parameters of AUCMargin")
parameter_axis.legend()
for axis in (auc_axis, parameter_axis):
    axis.grid(alpha=0.3)
figure.tight_layout()
plt.show()
