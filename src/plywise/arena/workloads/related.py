"""Workloads of the related papers: rare classes, generators, denoising, meta-learning."""

from functools import partial

import torch
from torch import Tensor, nn

from plywise.arena.task import RANKING, REGRESSION, SEQUENCES, WholeSetTask
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import mlp
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data, cut_tenths
from plywise.nn import VSML, UnfoldedDenoiser

SEED = 0
"""Seed of noise and episodes."""

# ---- a rare class ----------------------------------------------------------------------------------

RARE, SEEN = 8, 20
"""The class that a model separates from all others, and how many samples of it there are to learn from."""


def rare_digits() -> Data:
    """Digits, 1 for the eights: all that there are to validate and test, but only 20 to train on."""
    train, validation, test = load_digits()
    is_rare = train.y == RARE
    rows = ~is_rare | (is_rare.cumsum(0) <= SEEN)
    parts = Split(train.x[rows], train.y[rows]), validation, test
    return Data(*(Split(part.x, (part.y == RARE).float().unsqueeze(1)) for part in parts))


# ---- a generator -----------------------------------------------------------------------------------

NOISE = 16
"""Numbers that an image is made from."""


def energy_distance(samples: Tensor, data: Tensor) -> Tensor:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ between two sets of rows: 0 only for equal distributions.

    Székely, Rizzo, "Energy statistics", Journal of Statistical Planning and Inference 143, 2013.

    Args:
        samples: what a generator makes, (N, d).
        data: as many real rows, (N, d).
    """
    within = _measure_distance(samples) + _measure_distance(data)
    return 2 * torch.cdist(samples, data).mean() - within


def _measure_distance(rows: Tensor) -> Tensor:
    """Return the mean distance of two different rows."""
    return torch.pdist(rows).mean()


GENERATION = WholeSetTask(energy_distance, energy_distance, "energy distance")


def noise_and_digits() -> Data:
    """Unpaired noise and images of digits: only their distributions matter."""
    generator = torch.Generator().manual_seed(SEED)
    return Data(
        *(Split(torch.randn(len(part.x), NOISE, generator=generator), part.x) for part in load_digits())
    )


def generator_network() -> nn.Sequential:
    """16-128-128-64 with ReLU, pixels in [0, 1]."""
    return nn.Sequential(*mlp(NOISE, 128, 128, 64), nn.Sigmoid())


# ---- denoising -------------------------------------------------------------------------------------

LEVEL = 0.3
"""Deviation of the noise on pixels in [0, 1]."""


def noisy_digits() -> Data:
    """Digits (1, 8, 8) with noise that is drawn once, and the clean ones."""
    generator = torch.Generator().manual_seed(SEED)
    clean = [part.x.view(-1, 1, 8, 8) for part in load_digits()]
    return Data(*(Split(x + LEVEL * torch.randn(x.shape, generator=generator), x) for x in clean))


class Denoiser(nn.Module):
    """An unfolded denoiser for one known noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.solver = UnfoldedDenoiser("DScCP", channels=1, features=16, depth=6)

    def forward(self, x: Tensor) -> Tensor:
        """Clean images."""
        return self.solver(x, LEVEL)


# ---- learning to learn -----------------------------------------------------------------------------

SAMPLES = 8
"""Samples of an episode."""


def episodes() -> Data:
    """Make all episodes of 8 samples. The label is the input that is on, or in half of them the other.

    A row holds the sample (2) and its label (2), which the network gets only after its answer.
    """
    every = torch.arange(2 ** (SAMPLES + 1)).unsqueeze(1) >> torch.arange(SAMPLES + 1) & 1
    on, swapped = every[:, 1:], every[:, :1]
    label = on ^ swapped
    return cut_tenths(torch.cat([torch.eye(2)[on], torch.eye(2)[label]], -1), label)


class InEpisodes(nn.Module):
    """A VSML network of 2-2 that begins again in each episode, and learns by running over it."""

    def __init__(self) -> None:
        super().__init__()
        self.learner = VSML()
        self.learner.down.requires_grad_(False)  # it leads to a layer below, and there is none

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, T, 2) of episodes (B, T, 4), each made before its label was given."""
        samples, labels = x.movedim(1, 0).unsqueeze(2).split(2, -1)
        drawn = torch.Generator().manual_seed(SEED)  # the same beginning for the same place in a batch
        states = self.learner.initial_state([2, 2], episodes=len(x), generator=drawn)
        outputs, _ = self.learner(samples, labels, states)
        return outputs.squeeze(2).movedim(0, 1)


WORKLOADS = (
    Workload(
        "digits-rare",
        "64-64-64-1 with ReLU that tells eights from other digits, and has seen 20 of them: what counts "
        "is the order of scores.",
        partial(mlp, 64, 64, 64, 1),
        rare_digits,
        RANKING,
        batch_size=128,
        steps=200,
    ),
    Workload(
        "digits-generator",
        "16-128-128-64 with ReLU that makes images of digits from noise, as far from the real ones as "
        "their energy distance says.",
        generator_network,
        noise_and_digits,
        GENERATION,
        batch_size=128,
        steps=300,
    ),
    Workload(
        "digits-denoiser",
        "An unfolded denoiser (DScCP, six steps) on digits with noise of deviation 0.3 on each pixel.",
        Denoiser,
        noisy_digits,
        REGRESSION,
        batch_size=32,
        steps=200,
    ),
    Workload(
        "vsml-episodes",
        "A VSML network that is to learn, within 8 samples, which of two inputs means which class: "
        "backpropagation only trains the rule by which it learns.",
        InEpisodes,
        episodes,
        SEQUENCES,
        batch_size=16,
        steps=400,
    ),
)
