"""
SalpSGD: the benefit and the cost of a swarm around SGD
=======================================================

This example compares SalpSGD with SGD on digits at the same learning rate, per step and per pass. In each
step SalpSGD evaluates the point that SGD would reach and points around it (the chain of salps), and takes the
one with the lowest loss on the batch. No step is worse on its batch than SGD's, but each step costs several
forward and backward passes. SalpSGD leads per step (left), SGD leads per pass (right). The example also
prints how often a salp had a lower loss than the step of SGD.
"""

# %%
# A small network is trained on digits. All runs get the same batches.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from plywise.data.digits import load_digits
from plywise.optim import SalpSGD

torch.set_num_threads(1)
train, validation, _ = load_digits()
STEPS, BATCH, RATE = 300, 50, 0.1


def run(salps):
    """Return the validation loss and the number of passes before each step, and the steps that a salp won."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    params = list(model.parameters())
    optimizer = SalpSGD(params, lr=RATE, total_steps=STEPS, salps=salps, radius=0.01)
    losses, passes, calls, won = [], [], 0, 0
    for _ in range(STEPS):
        with torch.no_grad():
            losses.append(cross_entropy(model(validation.x), validation.y).item())
        passes.append(calls)
        rows = torch.randint(len(train.x), (BATCH,))

        def closure(rows=rows):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = cross_entropy(model(train.x[rows]), train.y[rows])
            loss.backward()
            return loss

        before = [param.detach().clone() for param in params]
        optimizer.step(closure)
        steps = zip(params, before, strict=True)
        won += any(not torch.allclose(p, b - RATE * p.grad, atol=1e-6) for p, b in steps)
    return losses, passes, won


# %%
# One salp is plain SGD; four and sixteen salps search around its step.

figure, (by_steps, by_passes) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for salps in (1, 4, 16):
    losses, passes, won = run(salps)
    label = "SGD" if salps == 1 else f"{salps} salps"
    print(
        f"{label:9s} validation loss {losses[-1]:.3f} after {passes[-1]} passes; "
        f"a salp was lower than the step of SGD in {won} of {STEPS} steps"
    )
    by_steps.plot(losses, label=label)
    by_passes.plot(passes, losses, label=label)

by_steps.set(xlabel="steps", ylabel="validation loss", yscale="log", title="per step")
by_passes.set(xlabel="forward and backward passes", xlim=(-50, 1550), title="per pass")
by_steps.legend()
plt.show()
