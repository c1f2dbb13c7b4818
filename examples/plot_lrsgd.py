"""
LRSGD: cost in gradients and in the epochs of the paper
=======================================================

This example compares LRSGD with SGD on digits, over the number of gradients and over "epochs" as the official
code of LRSGD counts them. LRSGD keeps the weights near their values at the start of an inner loop. The
official code counts an inner loop of about ten gradients as one step of an epoch, so its epochs cost about
ten epochs of SGD. Both plots show the same runs. The left one is the fair comparison: the lead of LRSGD in
the right one comes from a budget ten times as large.
"""

# %%
# A small network, the digits, and three optimizers; LRSGDR and LRSGDC have their default settings. Every step
# computes one gradient.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from plywise.data.digits import load_digits
from plywise.optim import LRSGDC, LRSGDR

torch.set_num_threads(1)
train, validation, test = load_digits()
STEPS, BATCH, EVERY = 1200, 50, 20
EPOCH = len(train.x) // BATCH

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "LRSGDR": lambda params: LRSGDR(params, lr=0.1, stop=0.1),
    "LRSGDC": lambda params: LRSGDC(params, lr=0.1, inner_steps=10),
}


def run(make, seed):
    """Return the validation losses, one per ``EVERY`` gradients, and the test accuracy."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer, losses = make(model.parameters()), []
    for step in range(STEPS):
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(cross_entropy(model(validation.x), validation.y).item())
        rows = torch.randint(len(train.x), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return losses, (model(test.x).argmax(1) == test.y).double().mean().item()


# %%
# Each optimizer runs with three seeds. In the count of the official code, one step is one gradient for SGD
# and about ten gradients for the others.

figure, (fair, unfair) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
print(f"after {STEPS} gradients each, means over 3 seeds:")
for name, make in OPTIMIZERS.items():
    runs = [run(make, seed) for seed in range(3)]
    losses = torch.tensor([losses for losses, _ in runs]).mean(0)
    accuracy = sum(accuracy for _, accuracy in runs) / len(runs)
    print(f"{name:8s} validation loss {losses[-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
    gradients = torch.arange(len(losses)) * EVERY
    fair.plot(gradients, losses, label=name)
    unfair.plot(gradients / (EPOCH if name == "SGD" else 10 * EPOCH), losses, label=name)

fair.set(xlabel="gradients", ylabel="validation loss", yscale="log", title="by cost")
unfair.set(xlabel="epochs as the paper's code counts", xlim=(0, 6), title="by the count of the paper")
fair.legend()
plt.show()
