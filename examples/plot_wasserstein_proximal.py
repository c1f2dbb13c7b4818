"""
wasserstein_proximal: a small GAN on digits
===========================================

A generator learns to draw handwritten digits from a critic that tells drawn ones from real ones. Three
trainings begin with the same weights. After each step of the critic the generator takes one step, or five; or
five that the Wasserstein proximal holds to what it drew before them. How good the drawings are is told by the
energy distance between 400 of them and 400 test digits (0 for the same distribution), next to that of 400
training digits. One seed, one rate, one step size: a demonstration of the penalty, no comparison of methods.
"""

# %%
# The digits, and the distance of two samples of images.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from plywise.data.digits import load_digits
from plywise.losses import wasserstein_proximal

torch.set_num_threads(1)
train, _, test = (part.x for part in load_digits())
CODE, BATCH, STEPS = 16, 64, 300


def energy_distance(one: Tensor, other: Tensor) -> float:
    """``2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖``."""
    within = sum(torch.pdist(x).mean().item() for x in (one, other))
    return 2 * torch.cdist(one, other).mean().item() - within


# %%
# The penalty is one line. The noise is held for the inner steps, so that the anchor is one forward.
def train_gan(inner: int, step: float) -> tuple[nn.Module, list[float], list[float]]:
    """The generator; every 25 steps the distance of its drawings; how far each update moved them."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(CODE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64)
    )
    generator.append(nn.Sigmoid())
    critic = nn.Sequential(
        nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
    )
    draws = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.99))
    judges = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.99))
    random = torch.Generator().manual_seed(0)
    look = torch.randn(400, CODE, generator=torch.Generator().manual_seed(1))
    distances, moves = [], []
    for k in range(STEPS):
        real = train[torch.randint(len(train), (BATCH,), generator=random)]
        z = torch.randn(BATCH, CODE, generator=random)
        anchor = generator(z).detach()
        loss = softplus(-critic(real)).mean() + softplus(critic(anchor)).mean()
        judges.zero_grad()
        loss.backward()
        judges.step()
        for _ in range(inner):
            drawn = generator(z)
            loss = softplus(-critic(drawn)).mean() + wasserstein_proximal(drawn, anchor, step)
            draws.zero_grad()
            loss.backward()
            draws.step()
        with torch.no_grad():
            moves.append((generator(z) - anchor).square().sum(1).mean().item())
            if (k + 1) % 25 == 0:
                distances.append(energy_distance(generator(look), test))
    return generator, distances, moves


runs = {
    "free, 1 step": train_gan(1, 1e9),  # so large a step that the penalty is nothing
    "free, 5 steps": train_gan(5, 1e9),
    "proximal, 5 steps": train_gan(5, 1.0),
}
floor = energy_distance(train[:400], test)
print(f"energy distance of training digits to test digits: {floor:.3f}")
for name, (_, distances, moves) in runs.items():
    print(
        f"{name:18} after 150 steps {distances[5]:.3f}, after {STEPS} {distances[-1]:.3f}; "
        f"mean squared move of a drawing in an update {sum(moves) / len(moves):.3f}"
    )

# %%
# The distances over the training, and ten drawings of each.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[1, 1.4])
for name, (_, distances, _) in runs.items():
    left.plot(range(25, STEPS + 1, 25), distances, "o-", markersize=4, label=name)
left.set(xlabel="step of the critic", ylabel="energy distance to test digits", yscale="log")
left.grid(alpha=0.3)
left.legend()
with torch.no_grad():
    z = torch.randn(10, CODE, generator=torch.Generator().manual_seed(2))
    rows = {"real": test[:10], **{name: generator(z) for name, (generator, _, _) in runs.items()}}
framed = [nn.functional.pad(images.reshape(-1, 8, 8), [1] * 4, value=0.5) for images in rows.values()]
sheet = torch.cat([torch.cat(list(images), 1) for images in framed])
right.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
right.set_yticks([10 * k + 4.5 for k in range(len(rows))], list(rows))
right.set(xticks=[])
figure.tight_layout()
plt.show()
