"""
AUC maximisation: a digit that is rare
======================================

Is it an eight? In training one digit in fifty is. Two equal networks learn it, one from the cross-entropy of
each sample, one from `AUCMargin`, which asks for eights to score higher than other digits. Its a and b follow
the mean scores of both classes, and its dual number α ascends while the weights descend. What counts is the
area under the ROC curve (AUC) on digits of which a tenth are eights, over several seeds.
"""

# %%
# The digits: all others, and 20 eights. `positive_share` tells the loss how rare eights are, so that it
# takes batches of any make-up, those without an eight too.

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits
from plywise.losses import AUCMargin
from plywise.losses.spauc import roc_auc

torch.set_num_threads(1)
EIGHTS, STEPS, SEEDS = 20, 600, 6


def data(seed):
    train, validation, test = load_digits(seed)
    y = train.y == 8
    kept = ~y | (y.cumsum(0) <= EIGHTS)
    return train.x[kept], y[kept], torch.cat([validation.x, test.x]), torch.cat([validation.y, test.y]) == 8


# %%
# The AUC margin loss is an ordinary module with three parameters. They go to the optimizer with those of the
# network; the sign of α's gradient is turned inside, so that a step that descends makes it ascend.


def trained(make_loss, rate, seed):
    x, y, x_test, y_test = data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    loss = make_loss(y.float().mean().item())
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=rate, momentum=0.9)
    areas, course = [], []
    for step in range(STEPS + 1):
        if step % 25 == 0:
            with torch.no_grad():
                areas.append(roc_auc(model(x_test).squeeze(1), y_test))
            course.append([parameter.item() for parameter in loss.parameters()])
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        loss(model(x[rows]).squeeze(1), y[rows].float()).backward()
        optimizer.step()
    return areas, course


# %%
# Learning rates were chosen on three other seeds, of 0.03 to 1 for the cross-entropy and 0.001 to 0.1 for
# `AUCMargin`, whose useful rates are smaller: at 0.03 and more its scores ended all alike.

methods = {
    "cross-entropy": (lambda share: nn.BCEWithLogitsLoss(), 0.3),
    "AUCMargin": (lambda share: AUCMargin(positive_share=share), 0.003),
}
runs = {name: [trained(*method, seed) for seed in range(SEEDS)] for name, method in methods.items()}
for name, pairs in runs.items():
    ends = torch.tensor([areas[-1] for areas, _ in pairs])
    print(f"{name}: AUC on test digits {ends.mean():.4f}, from {ends.min():.4f} to {ends.max():.4f}")
a, b, alpha = runs["AUCMargin"][0][1][-1]
print(f"AUCMargin, first seed, at the end: a = {a:.3f}, b = {b:.3f}, alpha = {alpha:.3f}")

# %%
# On the left the AUC as training goes on, thin lines for seeds and a thick one for their mean; on the right
# the three numbers of one run. Means of eights and others part, and α, which began to grow with the gap that
# was missing, falls as it closes.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
steps = range(0, STEPS + 1, 25)
for color, (name, pairs) in zip(("C0", "C1"), runs.items(), strict=True):
    curves = torch.tensor([areas for areas, _ in pairs])
    left.plot(steps, curves.T, color=color, alpha=0.25, linewidth=0.8)
    left.plot(steps, curves.mean(0), color=color, linewidth=2.5, label=name)
left.set(
    xlabel="step", ylabel="AUC on 697 test digits", ylim=(0.8, 1.0), title=f"{EIGHTS} eights to learn from"
)
left.legend(loc="lower right")
course = torch.tensor(runs["AUCMargin"][0][1])
for values, name in zip(
    course.T, ("a: follows the eights", "b: follows the others", "α, ascending"), strict=True
):
    right.plot(steps, values, label=name)
right.set(xlabel="step", title="the numbers inside AUCMargin")
right.legend()
for axis in (left, right):
    axis.grid(alpha=0.3)
figure.tight_layout()
plt.show()
