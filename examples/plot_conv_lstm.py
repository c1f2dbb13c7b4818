"""
ConvLSTM: predicting the next image of moving digits
====================================================

This example trains a `ConvLSTM` to predict the seventh image of a sequence from the first six. In each
sequence a handwritten digit (8×8 pixels) moves over a field of 16×16 pixels by a constant step: the digits
are real, their motion is artificial. The network has to estimate the direction from several images, since a
single image does not show it. It is compared with two predictions that need no training: the last image, and
the linear extrapolation of the last two. The test digits and their sequences are not in the training data.
"""

# %%
# Each digit starts at a random place, at least six steps away from the edge that it moves to.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from plywise.data.digits import load_digits
from plywise.nn import ConvLSTM

torch.set_num_threads(1)
torch.manual_seed(0)
train, _, test = load_digits()
FRAMES = 7


def make_sequences(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Make sequences of images, of shape (FRAMES, count, 1, 16, 16)."""
    selected = digits[torch.randint(len(digits), (count,), generator=generator)].reshape(-1, 8, 8)
    steps = torch.randint(-1, 2, (count, 2), generator=generator)
    free_places = 8 - (FRAMES - 1) * steps.abs()
    starts = (torch.rand(count, 2, generator=generator) * (free_places + 1)).long()
    starts += (FRAMES - 1) * (steps < 0)
    images = torch.zeros(FRAMES, count, 1, 16, 16)
    for k, (digit, (down, right), (row, column)) in enumerate(
        zip(selected, steps.tolist(), starts.tolist(), strict=True)
    ):
        for t in range(FRAMES):
            top, left = row + t * down, column + t * right
            images[t, k, 0, top : top + 8, left : left + 8] = digit
    return images


# %%
# The model is a ConvLSTM and a 1×1 convolution that maps its state to the next image.
class NextImage(nn.Module):
    """Predicts the next image of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.read = ConvLSTM(1, 12, kernel_size=5), nn.Conv2d(12, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (T, N, 1, 16, 16) to the next image."""
        return self.read(self.memory(images)[1][0])


model = NextImage()
optimizer = torch.optim.Adam(model.parameters(), 0.01)
generator = torch.Generator().manual_seed(0)
losses = []
for _ in range(100):
    images = make_sequences(train.x, 16, generator)
    loss = nn.functional.mse_loss(model(images[:-1]), images[-1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
# The mean squared errors on sequences of test digits.
images = make_sequences(test.x, 200, torch.Generator().manual_seed(1))
truth = images[-1]
with torch.no_grad():
    predictions = {
        "last image": images[-2],
        "extrapolation": (2 * images[-2] - images[-3]).clamp(0, 1),
        "ConvLSTM": model(images[:-1]).clamp(0, 1),
    }
errors = {name: nn.functional.mse_loss(prediction, truth).item() for name, prediction in predictions.items()}
for name, error in errors.items():
    print(f"{name:20} mean squared error {error:.4f}")

# %%
# Three sequences: the last two inputs, the next image, and the predictions.
figure, axes = plt.subplots(3, 6, figsize=(9, 4.8))
columns = [
    ("input before last", images[-3]),
    ("last input", images[-2]),
    ("next image", truth),
    *((f"{name}\n({errors[name]:.4f})", prediction) for name, prediction in predictions.items()),
]
for row, axis_row in enumerate(axes):
    for (title, column_images), axis in zip(columns, axis_row, strict=True):
        axis.imshow(column_images[row, 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
figure.suptitle("The next image of moving digits (mean squared error over 200 sequences)")
figure.tight_layout()
plt.show()
