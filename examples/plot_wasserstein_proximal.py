"""
wasserstein_proximal: a small GAN on digits
===========================================

This example trains a small GAN on digits with and without the Wasserstein proximal penalty. A generator
learns to produce handwritten digits from a critic that distinguishes generated images from real ones. Three
runs start from the same weights. After each step of the critic, the generator takes one step; or five steps;
or five steps with the penalty, which keeps its images close to those before the five steps. The measure is
the energy distance between 400 generated images and 400 test digits (0 for equal distributions), next to that
of 400 training digits. With one seed, one rate and one step size this demonstrates the penalty; it does not
compare methods.
"""

# %%
# The digits, and the distance between two samples of images.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from plywise.data.digits import load_digits
from plywise.losses import wasserstein_proximal

torch.set_num_threads(1)
train, _, test = (part.x for part in load_digits())
CODE, BATCH, STEPS = 16, 64, 300


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Return ``2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖``."""
    within = sum(torch.pdist(x).mean().item() for x in (first, second))
    return 2 * torch.cdist(first, second).mean().item() - within


# %%
# The penalty takes one line. All inner steps use the same noise, so the anchor needs one forward pass.
def train_gan(inner: int, step: float) -> tuple[nn.Module, list[float], list[float]]:
    """Return the generator, the distance after every 25 steps, and the mean squared move of each update."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(CODE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64)
    )
    generator.append(nn.Sigmoid())
    critic = nn.Sequential(
        nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
    )
    generator_optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.99))
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.99))
    random = torch.Generator().manual_seed(0)
    test_noise = torch.randn(400, CODE, generator=torch.Generator().manual_seed(1))
    distances, moves = [], []
    for k in range(STEPS):
        real = train[torch.randint(len(train), (BATCH,), generator=random)]
        z = torch.randn(BATCH, CODE, generator=random)
        anchor = generator(z).detach()
        loss = softplus(-critic(real)).mean() + softplus(critic(anchor)).mean()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        for _ in range(inner):
            generated = generator(z)
            loss = softplus(-critic(generated)).mean() + wasserstein_proximal(generated, anchor, step)
            generator_optimizer.zero_grad()
            loss.backward()
            generator_optimizer.step()
        with torch.no_grad():
            moves.append((generator(z) - anchor).square().sum(1).mean().item())
            if (k + 1) % 25 == 0:
                distances.append(energy_distance(generator(test_noise), test))
    return generator, distances, moves


runs = {
    "no penalty, 1 step": train_gan(1, 1e9),  # with this step size the penalty is negligible
    "no penalty, 5 steps": train_gan(5, 1e9),
    "penalty, 5 steps": train_gan(5, 1.0),
}
floor = energy_distance(train[:400], test)
print(f"energy distance of training digits to test digits: {floor:.3f}")
for name, (_, distances, moves) in runs.items():
    print(
        f"{name:19} after 150 steps {distances[5]:.3f}, after {STEPS} {distances[-1]:.3f}; "
        f"mean squared move of an image per update {sum(moves) / len(moves):.3f}"
    )

# %%
# The distance during training, and ten generated images of each run.
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
