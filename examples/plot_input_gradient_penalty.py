"""
A penalty on the input gradient: digits that an attack moves less
==================================================================

Two equal networks learn the digits that ship with plywise. One also pays for the L1 norm of its loss's
gradient with respect to the pixels (L1 double backpropagation). Then both are attacked: every pixel may
change by up to ε, in the direction that raises the loss. To first order such an attack adds ε times the
penalty to the loss, so the network that was trained to keep it small should hold longer. We look at the fast
gradient sign method, which takes one step, and at ten smaller steps of it; real attackers try harder.
"""

# %%
# The two networks. SiLU is smooth, so that the penalty sees how its slope bends. The natural weight of the
# penalty is the ε that one expects.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from plywise.data.digits import load_digits
from plywise.losses import input_gradient_penalty

torch.set_num_threads(1)
train, _, test = load_digits()


def trained(weight, seed=0, epochs=40):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train.y)).split(64):
            x = train.x[rows].requires_grad_()
            losses = F.cross_entropy(model(x), train.y[rows], reduction="none")
            loss = losses.mean()
            if weight:
                loss = loss + weight * input_gradient_penalty(losses, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


models = {"plain": trained(0.0), "with penalty, λ = 0.1": trained(0.1)}

# %%
# The attack: steps along the sign of the gradient, kept within ε and within the range of the pixels.


def attacked(model, epsilon, steps):
    x, rate = test.x, epsilon if steps == 1 else epsilon / 4
    for _ in range(steps):
        at = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), test.y, reduction="sum"), at)
        x = at + rate * gradient.sign()
        x = torch.min(torch.max(x, test.x - epsilon), test.x + epsilon).clamp(0, 1)
    return x.detach()


def accuracy(model, x):
    with torch.no_grad():
        return (model(x).argmax(1) == test.y).float().mean().item()


sizes = [0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2]
curves = {
    (name, steps): [accuracy(model, attacked(model, size, steps)) for size in sizes]
    for name, model in models.items()
    for steps in (1, 10)
}
for name, model in models.items():
    at = test.x.clone().requires_grad_()
    penalty = input_gradient_penalty(F.cross_entropy(model(at), test.y, reduction="none"), at)
    print(f"{name}: penalty on test digits {penalty.item():.2f}")
for (name, steps), values in curves.items():
    print(
        f"{name}, {steps:2} steps: {'  '.join(f'{s:g}: {v:.3f}' for s, v in zip(sizes, values, strict=True))}"
    )

# %%
# Accuracy against the size of the attack. One step is drawn solid, ten steps dashed.

figure, axis = plt.subplots(figsize=(7, 4))
for (name, steps), values in curves.items():
    color = "C0" if name == "plain" else "C1"
    style = "-" if steps == 1 else "--"
    axis.plot(sizes, values, style, color=color, marker="o", label=f"{name}, {steps} step{'s' * (steps > 1)}")
axis.set(xlabel="ε: largest change of a pixel (pixels are in 0 to 1)", ylabel="accuracy on 400 test digits")
axis.set_ylim(0, 1.02)
axis.grid(alpha=0.3)
axis.legend()
figure.tight_layout()
plt.show()
