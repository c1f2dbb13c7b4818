"""
VSML: a learning rule that was itself learned
=============================================

No weight of this network is trained on the digits that it tells apart at the end. Each of its connections
is a tiny LSTM; all share the same 2,384 numbers, and these are trained by backpropagation through short
episodes, so that the network learns while it runs: it sees a sample, answers, and then receives how wrong it
was. First the episodes are of two inputs and two classes, then of two digits from 0 to 5 with shuffled
pixels. The picture shows new episodes with digits from 6 to 9 of the test part: how often the n-th sample
is told right. This is a small demonstration on small tasks, seconds of training, and no claim beyond it.
"""

# %%
# Episodes: of a single bit, whose meaning changes; and of two digits, 4×4 pixels, shuffled.
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


def bits(vsml: VSML, count: int, generator: torch.Generator) -> Episodes:
    """Which of two inputs is on is the label, or the other one is."""
    on = torch.randint(2, (8, count, 1), generator=generator)
    swapped = torch.randint(2, (1, count, 1), generator=generator)
    states = vsml.initial_state([2, 2], episodes=count, generator=generator)
    return torch.eye(2)[on], torch.eye(2)[on ^ swapped], states


def by_digit(part: Split) -> list[Tensor]:
    small = nn.functional.avg_pool2d(part.x.reshape(-1, 1, 8, 8), 2).flatten(1)
    return [3 * (small[part.y == digit] - 0.3) for digit in range(10)]


def digits(vsml: VSML, pools: list[Tensor], steps: int, count: int, generator: torch.Generator) -> Episodes:
    """Two of the pools, in episodes of ``steps`` samples; pixels in an order of the episode's own."""
    labels = torch.randint(2, (steps, count, 1), generator=generator)
    x = torch.empty(steps, count, 1, 16)
    for episode in range(count):
        order = torch.randperm(16, generator=generator)
        for label, pool in enumerate(torch.randperm(len(pools), generator=generator)[:2].tolist()):
            at = labels[:, episode, 0] == label
            chosen = torch.randint(len(pools[pool]), (int(at.sum()),), generator=generator)
            x[at, episode, 0] = pools[pool][chosen][:, order]
    states = vsml.initial_state([16, 2], episodes=count, generator=generator)
    return x, torch.eye(2)[labels], states


# %%
# Meta-training: 220 steps on bits, then 150 on digits from 0 to 5. Untrained, the network learns nothing.
def lesson(vsml: VSML, generator: torch.Generator) -> Iterator[Episodes]:
    for _ in range(220):
        yield bits(vsml, 16, generator)
    pools = by_digit(train)[:6]
    for _ in range(150):
        yield digits(vsml, pools, 16, 16, generator)


def told_right(vsml: VSML) -> Tensor:
    """How often each sample of an episode is told right, over 300 episodes of the digits from 6 to 9."""
    x, y, states = digits(vsml, by_digit(test)[6:], 40, 300, torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs, _ = vsml(x, y, states)
    return (outputs.argmax(-1) == y.argmax(-1)).float().mean((1, 2))


vsml = VSML()
before = told_right(vsml)
optimizer = torch.optim.Adam(vsml.parameters(), 0.03)
losses = meta_train(vsml, lesson(vsml, torch.Generator().manual_seed(0)), optimizer, clip=1.0)
after = told_right(vsml)
print(f"numbers trained: {sum(p.numel() for p in vsml.parameters())}")
for name, right in (("before meta-training", before), ("after", after)):
    print(
        f"{name:20} first sample {right[0]:.2f}, samples 2 to 5 {right[1:5].mean():.2f}, "
        f"last ten {right[-10:].mean():.2f}"
    )

# %%
# In training the loss stays at chance (ln 2) until a rule is found; in new episodes accuracy grows.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
left.plot(losses, linewidth=0.8)
left.axvline(220, color="grey", linestyle=":")
left.text(216, 0.75, "bits", ha="right")
left.text(224, 0.75, "digits")
left.axhline(0.6931, color="grey", linestyle="--", linewidth=0.8)
left.set(xlabel="step of meta-training", ylabel="cross entropy", ylim=(0, 0.85))
right.plot(range(1, 41), before, color="grey", label="before meta-training")
right.plot(range(1, 41), after, "o-", markersize=3, label="after")
right.set(xlabel="sample of the episode", ylabel="told right", ylim=(0.4, 1), title="two digits from 6 to 9")
right.grid(alpha=0.3)
right.legend()
figure.tight_layout()
plt.show()
