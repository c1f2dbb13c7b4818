"""Compare methods that remove Gaussian noise from real images: four unfolded solvers, blur, total variation.

    python benchmarks/denoising.py                    # writes benchmarks/denoising.json and .svg

The images are grey CIFAR-10 images, or Fashion-MNIST if those are missing. Each `plywise.nn.UnfoldedDenoiser`
is trained once, on patches of 16×16 with noise of all levels; the level is an input. A Gaussian blur and
total variation (the differences of neighbours as fixed filters, 40 steps) use the best parameter of a grid
for each level, by the PSNR on images of the training part that are not used for training. PSNR is the mean
over test images; all outputs are clamped to [0, 1], the noisy input is not. There is one thread and one seed,
so the spread over seeds is unknown; seconds are CPU time.

The script has its own training loop because each step draws new patches and new noise, while a trial of the
arena trains on batches of a data set.
"""

import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.data.sets import load_cifar10, load_grey_images
from plywise.errors import PlywiseError
from plywise.nn import UnfoldedDenoiser
from plywise.nn.unfolded_denoiser import SCHEMES

LEVELS = (15 / 255, 25 / 255, 50 / 255)
TRAIN, VALIDATION, TEST = 20_000, 100, 500
FEATURES, DEPTH, STEPS, BATCH, PATCH, RATE = 16, 10, 1600, 16, 16, 0.03
BLURS = [0.1 * k for k in range(2, 16)]
WEIGHTS = [0.015 * 1.5**k for k in range(8)]
Denoiser = Callable[[Tensor, float], Tensor]
Table = dict[str, dict[str, float]]
About = dict[str, dict[str, object]]


def read_grey_images() -> tuple[str, Tensor, Tensor]:
    """Return the name of the data set and some training and test images (N, 1, H, W) in [0, 1]."""
    luminance = torch.tensor([0.299, 0.587, 0.114])
    try:
        train, _, test, _ = load_cifar10()
    except PlywiseError as error:
        print(f"{error}\nFashion-MNIST is used instead.")
        train, _, test, _ = load_grey_images("fashion_mnist")
        name, to_grey = "Fashion-MNIST", lambda x: x
    else:
        name, to_grey = "CIFAR-10, grey", lambda x: x @ luminance
    parts = [torch.from_numpy(x.copy()) for x in (train[: TRAIN + VALIDATION], test[:TEST])]
    return name, *(to_grey(part.float() / 255).unsqueeze(1) for part in parts)


def compute_psnr(images: Tensor, clean: Tensor) -> float:
    """Return the mean PSNR over images, in dB."""
    return -10 * (images - clean).square().mean((1, 2, 3)).log10().mean().item()


def add_noise(clean: Tensor, level: float | Tensor, seed: int) -> Tensor:
    return clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def blur(x: Tensor, width: float) -> Tensor:
    reach = max(1, math.ceil(3 * width))
    taps = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * width**2))
    taps = (taps / taps.sum()).reshape(1, 1, 1, -1)
    padded = nn.functional.pad(x, [reach] * 4, mode="replicate")
    return nn.functional.conv2d(nn.functional.conv2d(padded, taps), taps.mT).clamp(0, 1)


def make_total_variation(depth: int = 40) -> Denoiser:
    """Make a solver whose filters are the differences of neighbours."""
    solver = UnfoldedDenoiser("DDiFB", channels=1, features=2, depth=depth)
    differences = torch.zeros(2, 1, 3, 3)
    differences[0, 0, 1, 1:] = differences[1, 0, 1:, 1] = torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        solver.operators.weight.copy_(differences)
    # outside the border the solver sees zeros, so the image is padded with its last pixels
    pad = lambda x: nn.functional.pad(x, [4] * 4, mode="replicate")  # noqa: E731
    return lambda x, weight: solver(pad(x), math.sqrt(weight))[..., 4:-4, 4:-4]


def tune_filter(denoise: Denoiser, grid: list[float], clean: Tensor, level: float) -> float:
    """Return the number of the grid with the best PSNR."""
    x = add_noise(clean, level, 1)
    best = max(grid, key=lambda number: compute_psnr(denoise(x, number), clean))
    if best in (grid[0], grid[-1]):
        print(f"  the best value is at the end of the grid: {best:g}")
    return best


def train_denoiser(scheme: str, clean: Tensor) -> UnfoldedDenoiser:
    torch.manual_seed(0)
    denoiser = UnfoldedDenoiser(scheme, channels=1, features=FEATURES, depth=DEPTH)
    optimizer = torch.optim.Adam(denoiser.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        top, left = (int(n) for n in torch.randint(clean.shape[-1] - PATCH + 1, (2,), generator=generator))
        batch = clean[torch.randint(len(clean), (BATCH,), generator=generator)]
        batch = batch[..., top : top + PATCH, left : left + PATCH]
        level = (5 + 50 * torch.rand(BATCH, generator=generator)) / 255
        loss = nn.functional.mse_loss(
            denoiser(add_noise(batch, level.reshape(-1, 1, 1, 1), step), level), batch
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser


def draw_picture(table: Table, dataset: str) -> None:
    """Draw the PSNR of each method at each noise level."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    names = list(table)
    for index, name in enumerate(names):
        positions = [k + (index - (len(names) - 1) / 2) * 0.12 for k in range(len(LEVELS))]
        bars = axis.bar(positions, list(table[name].values()), 0.11, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=6.5, padding=1)
    axis.set_xticks(range(len(LEVELS)), [f"σ = {255 * level:.0f}/255" for level in LEVELS])
    axis.set(ylabel="PSNR, dB", ylim=(12, 36), title=f"{dataset}: {TEST} test images")
    axis.legend(fontsize=8, ncols=4, loc="upper right")
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    save_picture(figure, Path(__file__).with_suffix(".svg"))


def compare_filters(validation: Tensor, test: Tensor, noise: dict[str, Tensor]) -> tuple[Table, About]:
    """Return the PSNR of the filters, tuned for each level, and the chosen numbers."""
    table, about = {}, {}
    with torch.no_grad():
        for name, denoise, grid in (("blur", blur, BLURS), ("TV", make_total_variation(), WEIGHTS)):
            best = [tune_filter(denoise, grid, validation, level) for level in LEVELS]
            about[name] = {"tuned": best}
            table[name] = {
                level: compute_psnr(denoise(x, number), test)
                for (level, x), number in zip(noise.items(), best, strict=True)
            }
    return table, about


def compare_networks(train: Tensor, test: Tensor, noise: dict[str, Tensor]) -> tuple[Table, About]:
    """Return the PSNR of the unfolded schemes, each trained once, with their size and training time."""
    table, about = {}, {}
    for scheme in SCHEMES:
        start = time.process_time()
        denoiser = train_denoiser(scheme, train)
        about[scheme] = {
            "weights": sum(p.numel() for p in denoiser.parameters()),
            "training_cpu_s": time.process_time() - start,
        }
        with torch.no_grad():
            table[scheme] = {
                name: compute_psnr(denoiser(x, level), test)
                for (name, x), level in zip(noise.items(), LEVELS, strict=True)
            }
    return table, about


def describe_settings(dataset: str) -> dict[str, object]:
    return {
        "data": dataset,
        "images": {"train": TRAIN, "validation": VALIDATION, "test": TEST},
        "features": FEATURES,
        "depth": DEPTH,
        "steps": STEPS,
        "batch": BATCH,
        "patch": PATCH,
        "rate": RATE,
    }


def main() -> None:
    torch.set_num_threads(1)
    dataset, train, test = read_grey_images()
    train, validation = train[:TRAIN], train[TRAIN:]
    noise = {f"{255 * level:.0f}/255": add_noise(test, level, 2) for level in LEVELS}
    table: Table = {"noisy": {name: compute_psnr(x, test) for name, x in noise.items()}}
    about: About = {}
    for rows, facts in (compare_filters(validation, test, noise), compare_networks(train, test, noise)):
        table |= rows
        about |= facts
    for name, row in table.items():
        levels = (f"{level}: {value:6.2f} dB  " for level, value in row.items())
        print(f"{name:8}", *levels, about.get(name, ""))
    result = {
        "environment": {"date": datetime.now(UTC).date().isoformat(), **environment()},
        "settings": describe_settings(dataset),
        "psnr_db": table,
        "about": about,
    }
    write_whole(Path(__file__).with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    draw_picture(table, dataset)


if __name__ == "__main__":
    main()
