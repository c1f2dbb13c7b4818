"""
The toolkit CNN: a small recipe for digits
==========================================

Twice batch norm, a convolution of 5×5 and pooling, then two linear layers with dropout: a network that
tutorials of deep learning toolkits train on MNIST. At 28×28 pixels it has 1.66 million parameters, which is
heavy for a CPU; on the digits of 8×8 that ship with plywise the same layout has a ninth of that and trains in
seconds. The paper behind it (Zhao et al.) gives about 1.7 million and no widths that we know of; those here
are chosen to fit. Its 99 % on MNIST is not reproduced here. The picture shows the accuracy over epochs and
the digits that it gets wrong.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits

# %%
# The layout, for square images of any size.


def toolkit_cnn(side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(64 * (side // 4) ** 2, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, 10),
    )


for side in (28, 8):
    print(f"{side}×{side} pixels: {sum(p.numel() for p in toolkit_cnn(side).parameters()):,} parameters")

# %%
# Eight epochs of Adam.

torch.manual_seed(0)
train, validation, test = load_digits()
model = toolkit_cnn(8)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)


def decided(x: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(x.reshape(-1, 1, 8, 8)).argmax(1)


curve = []
for _ in range(8):
    model.train()
    for rows in torch.randperm(len(train.y)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows].reshape(-1, 1, 8, 8)), train.y[rows]).backward()
        optimizer.step()
    curve.append((decided(validation.x) == validation.y).double().mean().item())

guess = decided(test.x)
wrong = (guess != test.y).nonzero()[:, 0]
print(f"validation accuracy after 1 epoch {curve[0]:.3f}, after {len(curve)} {curve[-1]:.3f}")
print(f"{len(wrong)} of {len(test.y)} test digits wrong: accuracy {1 - len(wrong) / len(test.y):.3f}")

# %%
# The curve, and up to eight of the wrong ones.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(range(1, len(curve) + 1), curve, "o-")
left.set(xlabel="epochs of training", ylabel="accuracy on validation digits", title="Training")
tiles = torch.zeros(2, 4, 12, 10)
for place, index in enumerate(wrong[:8].tolist()):
    row, column = divmod(place, 4)
    tiles[row, column, 3:11, 1:9] = test.x[index].reshape(8, 8)
    label = f"{int(test.y[index])}, not {int(guess[index])}"
    right.text(10 * column + 4.5, 12 * row + 1, label, color="white", ha="center", va="center", fontsize=9)
right.imshow(tiles.permute(0, 2, 1, 3).reshape(24, 40), cmap="gray")
right.set(title="What it gets wrong", xticks=[], yticks=[])
plt.show()
