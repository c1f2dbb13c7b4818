"""
ConvLSTM: the next image of digits that move
============================================

Handwritten digits (real ones, 8×8 pixels) drift over a field of 16×16 pixels, each by a constant step of
its own: the pictures are real, their motion is made. A `ConvLSTM` sees six images and paints the seventh.
It has to read the direction off what it saw, since one image does not show it. It is compared with the
two guesses that need no learning: the last image again, and the last two continued linearly. Digits and
motions of the test were not trained on.
"""

# %%
# Sequences: a digit starts at random, at least six steps from the edge that it moves to.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from plywise.data.digits import load_digits
from plywise.nn import ConvLSTM

torch.set_num_threads(1)
torch.manual_seed(0)
train, _, test = load_digits()
FRAMES = 7


def sequences(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(FRAMES, count, 1, 16, 16)."""
    chosen = digits[torch.randint(len(digits), (count,), generator=generator)].reshape(-1, 8, 8)
    steps = torch.randint(-1, 2, (count, 2), generator=generator)
    room = 8 - (FRAMES - 1) * steps.abs()
    starts = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    starts += (FRAMES - 1) * (steps < 0)
    film = torch.zeros(FRAMES, count, 1, 16, 16)
    for k, (digit, (down, right), (row, column)) in enumerate(
        zip(chosen, steps.tolist(), starts.tolist(), strict=True)
    ):
        for t in range(FRAMES):
            top, left = row + t * down, column + t * right
            film[t, k, 0, top : top + 8, left : left + 8] = digit
    return film


# %%
# The model: a ConvLSTM, and a 1×1 convolution that reads the next image off its state.
class NextImage(nn.Module):
    """The image that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.read = ConvLSTM(1, 12, kernel_size=5), nn.Conv2d(12, 1, 1)

    def forward(self, film: Tensor) -> Tensor:
        """Images (T, N, 1, 16, 16) to the next one."""
        return self.read(self.memory(film)[1][0])


model = NextImage()
optimizer = torch.optim.Adam(model.parameters(), 0.01)
generator = torch.Generator().manual_seed(0)
losses = []
for _ in range(100):
    film = sequences(train.x, 16, generator)
    loss = nn.functional.mse_loss(model(film[:-1]), film[-1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
# On digits of the test part.
film = sequences(test.x, 200, torch.Generator().manual_seed(1))
truth = film[-1]
with torch.no_grad():
    guesses = {
        "last image": film[-2],
        "continued linearly": (2 * film[-2] - film[-3]).clamp(0, 1),
        "ConvLSTM": model(film[:-1]).clamp(0, 1),
    }
errors = {name: nn.functional.mse_loss(guess, truth).item() for name, guess in guesses.items()}
for name, error in errors.items():
    print(f"{name:20} mean squared error {error:.4f}")

# %%
# Three sequences: what was seen, what came, what was painted.
figure, axes = plt.subplots(3, 6, figsize=(9, 4.8))
columns = [
    ("two before", film[-3]),
    ("the last seen", film[-2]),
    ("what came", truth),
    *((f"{name}\n({errors[name]:.4f})", guess) for name, guess in guesses.items()),
]
for row, axis_row in enumerate(axes):
    for (title, images), axis in zip(columns, axis_row, strict=True):
        axis.imshow(images[row, 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
figure.suptitle("The next image of moving digits (mean squared error over 200 sequences)")
figure.tight_layout()
plt.show()
