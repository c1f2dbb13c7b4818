"""
VSML: a learning rule that was itself learned
=============================================

This example meta-trains a network that learns to classify while it runs, and tests it on digits that were
never used for training. Each connection of the network is a tiny LSTM; all of them share the same 2,384
parameters. These are trained by backpropagation through short episodes, in which the network gets a sample,
predicts its class, and then receives the error. The first episodes have two inputs and two classes, the later
ones two digits from 0 to 5 with shuffled pixels. The right plot shows the accuracy on the n-th sample of new
episodes, with digits from 6 to 9 of the test part. This is a small demonstration on small tasks with seconds
of training, and shows no more than that.
"""

# %%
# There are two kinds of episodes: a single bit whose meaning changes, and two digits of 4×4 shuffled pixels.
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from plywise.data.digits import Split, load_digits
from plywise.nn import VSML
from plywise.nn.vsml import LayerState, meta_train

torch.set_num_threads(1)
torch.manual_seed(0)
train, _, test = load_digits()
Episodes = tuple[Tensor, Tensor, list[LayerState]]


def make_bits(vsml: VSML, count: int, generator: torch.Generator) -> Episodes:
    """Make episodes in which one of two inputs is on; the label is this input, or always the other one."""
    on = torch.randint(2, (8, count, 1), generator=generator)
    swapped = torch.randint(2, (1, count, 1), generator=generator)
    states = vsml.initial_state([2, 2], episodes=count, generator=generator)
    return torch.eye(2)[on], torch.eye(2)[on ^ swapped], states


def split_by_digit(part: Split) -> list[Tensor]:
    small = nn.functional.avg_pool2d(part.x.reshape(-1, 1, 8, 8), 2).flatten(1)
    return [3 * (small[part.y == digit] - 0.3) for digit in range(10)]


def make_digits(
    vsml: VSML, pools: list[Tensor], steps: int, count: int, generator: torch.Generator
) -> Episodes:
    """Make episodes of ``steps`` samples from two of the pools; each episode has its own order of pixels."""
    labels = torch.randint(2, (steps, count, 1), generator=generator)
    x = torch.empty(steps, count, 1, 16)
    for episode in range(count):
        order = torch.randperm(16, generator=generator)
        for label, pool in enumerate(torch.randperm(len(pools), generator=generator)[:2].tolist()):
            at = labels[:, episode, 0] == label
            indices = torch.randint(len(pools[pool]), (int(at.sum()),), generator=generator)
            x[at, episode, 0] = pools[pool][indices][:, order]
    states = vsml.initial_state([16, 2], episodes=count, generator=generator)
    return x, torch.eye(2)[labels], states


# %%
# Meta-training takes 220 steps on bits, then 150 on digits from 0 to 5. Before it, the network learns
# nothing.
def make_lessons(vsml: VSML, generator: torch.Generator) -> Iterator[Episodes]:
    for _ in range(220):
        yield make_bits(vsml, 16, generator)
    pools = split_by_digit(train)[:6]
    for _ in range(150):
        yield make_digits(vsml, pools, 16, 16, generator)


def measure_accuracy(vsml: VSML) -> Tensor:
    """Return the accuracy on each sample of an episode, over 300 episodes with digits from 6 to 9."""
    x, y, states = make_digits(vsml, split_by_digit(test)[6:], 40, 300, torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs, _ = vsml(x, y, states)
    return (outputs.argmax(-1) == y.argmax(-1)).float().mean((1, 2))


vsml = VSML()
before = measure_accuracy(vsml)
optimizer = torch.optim.Adam(vsml.parameters(), 0.03)
losses = meta_train(vsml, make_lessons(vsml, torch.Generator().manual_seed(0)), optimizer, clip=1.0)
after = measure_accuracy(vsml)
print(f"trained parameters: {sum(p.numel() for p in vsml.parameters())}")
for name, right in (("before meta-training", before), ("after", after)):
    print(
        f"{name:20} first sample {right[0]:.2f}, samples 2 to 5 {right[1:5].mean():.2f}, "
        f"last ten {right[-10:].mean():.2f}"
    )

# %%
# In meta-training the loss stays at chance (ln 2) until the network finds a learning rule. In new episodes
# the accuracy grows with the number of samples.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
left.plot(losses, linewidth=0.8)
left.axvline(220, color="grey", linestyle=":")
left.text(216, 0.75, "bits", ha="right")
left.text(224, 0.75, "digits")
left.axhline(0.6931, color="grey", linestyle="--", linewidth=0.8)
left.set(xlabel="step of meta-training", ylabel="cross entropy", ylim=(0, 0.85))
right.plot(range(1, 41), before, color="grey", label="before meta-training")
right.plot(range(1, 41), after, "o-", markersize=3, label="after")
right.set(xlabel="sample of the episode", ylabel="accuracy", ylim=(0.4, 1), title="two digits from 6 to 9")
right.grid(alpha=0.3)
right.legend()
figure.tight_layout()
plt.show()
