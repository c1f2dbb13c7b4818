"""
Input-gradient penalty: robustness against small attacks
========================================================

This example trains two equal networks on digits and compares their accuracy under adversarial attacks. The
loss of one network includes a penalty: the L1 norm of the loss's gradient with respect to the pixels (L1
double backpropagation). An attack may change each pixel by up to ε, in the direction that increases the loss.
To first order it adds ε times the penalty to the loss, so the network with a small penalty should be more
robust. We test the fast gradient sign method, which takes one step, and ten smaller steps of the same kind.
Real attacks are stronger.
"""

# %%
# The two networks. They use SiLU because it is smooth: the gradient of the penalty needs its second
# derivative. A natural weight of the penalty is the ε of the expected attack.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from plywise.data.digits import load_digits
from plywise.losses import input_gradient_penalty

torch.set_num_threads(1)
train, _, test = load_digits()


def train_network(weight, seed=0, epochs=40):
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


models = {"plain": train_network(0.0), "with penalty, λ = 0.1": train_network(0.1)}

# %%
# The attack takes steps along the sign of the gradient. The result stays within ε and in the range of the
# pixels.


def attack_digits(model, epsilon, steps):
    x, rate = test.x, epsilon if steps == 1 else epsilon / 4
    for _ in range(steps):
        inputs = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs), test.y, reduction="sum"), inputs)
        x = inputs + rate * gradient.sign()
        x = torch.min(torch.max(x, test.x - epsilon), test.x + epsilon).clamp(0, 1)
    return x.detach()


def measure_accuracy(model, x):
    with torch.no_grad():
        return (model(x).argmax(1) == test.y).float().mean().item()


sizes = [0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2]
curves = {
    (name, steps): [measure_accuracy(model, attack_digits(model, size, steps)) for size in sizes]
    for name, model in models.items()
    for steps in (1, 10)
}
for name, model in models.items():
    inputs = test.x.clone().requires_grad_()
    penalty = input_gradient_penalty(F.cross_entropy(model(inputs), test.y, reduction="none"), inputs)
    print(f"{name}: penalty on test digits {penalty.item():.2f}")
for (name, steps), values in curves.items():
    print(
        f"{name}, {steps:2} steps: {'  '.join(f'{s:g}: {v:.3f}' for s, v in zip(sizes, values, strict=True))}"
    )

# %%
# The accuracy over the size of the attack: solid lines for one step, dashed lines for ten steps.

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
