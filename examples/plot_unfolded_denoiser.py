"""
UnfoldedDenoiser: a convex solver with trained filters
======================================================

This example trains four networks to remove Gaussian noise from digits. Each network is a convex solver of six
steps with trained filters. The noise level is an input, so one network works for all levels: each is trained
on levels from 0.05 to 0.45 and tested on other digits. The curves show the PSNR with respect to the clean
digits (more is better), next to that of the noisy images and of the best Gaussian blur, whose width is chosen
for each level by comparison with the clean images.
"""

# %%
# The digits, the noise levels, and the measure.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from plywise.data.digits import load_digits
from plywise.nn import UnfoldedDenoiser

torch.set_num_threads(1)
torch.manual_seed(0)
train, _, test = (part.x.reshape(-1, 1, 8, 8) for part in load_digits())
LEVELS = (0.1, 0.2, 0.3, 0.4)


def compute_psnr(images: Tensor) -> float:
    """Return the mean PSNR over the test images, in decibels."""
    return -10 * (images - test).square().mean((1, 2, 3)).log10().mean().item()


def blur(images: Tensor, width: float) -> Tensor:
    """Blur images with a Gaussian kernel."""
    taps = torch.exp(-torch.arange(-3, 4.0).square() / (2 * width**2))
    taps = (taps / taps.sum()).reshape(1, 1, 1, 7)
    padded = nn.functional.pad(images, [3] * 4)
    return nn.functional.conv2d(nn.functional.conv2d(padded, taps), taps.mT).clamp(0, 1)


# %%
# All networks are trained with the same noise.
networks = {}
for scheme in ("DDFB", "DDiFB", "DCP", "DScCP"):
    network = UnfoldedDenoiser(scheme, channels=1, features=16, depth=6)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        clean = train[torch.randint(len(train), (32,), generator=generator)]
        level = 0.05 + 0.4 * torch.rand(32, generator=generator)
        noisy = clean + level.reshape(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
        loss = nn.functional.mse_loss(network(noisy, level), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    networks[scheme] = network

# %%
# The results on the test digits.
noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
curves: dict[str, list[float]] = {"noisy": [], "best blur": [], **{name: [] for name in networks}}
with torch.no_grad():
    for level in LEVELS:
        noisy = test + level * noise
        curves["noisy"].append(compute_psnr(noisy))
        curves["best blur"].append(max(compute_psnr(blur(noisy, 0.05 * k)) for k in range(4, 30)))
        for name, network in networks.items():
            curves[name].append(compute_psnr(network(noisy, level)))
    denoised = {name: network(test + 0.3 * noise, 0.3) for name, network in networks.items()}
for name, values in curves.items():
    print(f"{name:10}", *(f"{level}: {value:5.2f} dB  " for level, value in zip(LEVELS, values, strict=True)))

# %%
# The PSNR over the noise level, and ten digits at level 0.3.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[1, 1.05])
for name, values in curves.items():
    left.plot(LEVELS, values, "k--" if name == "noisy" else "o-", label=name)
left.set(xlabel="standard deviation of the noise", ylabel="PSNR, dB", xticks=LEVELS)
left.grid(alpha=0.3)
left.legend()
rows = {"clean": test, "noisy": test + 0.3 * noise, **denoised}
framed = [nn.functional.pad(images[:10, 0], [1] * 4, value=0.5) for images in rows.values()]
sheet = torch.cat([torch.cat(list(images), 1) for images in framed])
right.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
right.set_yticks([10 * k + 4.5 for k in range(len(rows))], list(rows))
right.set(xticks=[], title="noise 0.3")
figure.tight_layout()
plt.show()
