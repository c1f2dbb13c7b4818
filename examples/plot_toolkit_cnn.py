"""
The toolkit CNN: a small recipe for digits
==========================================

This example trains the network that tutorials of deep learning toolkits use for MNIST, on smaller digits. It
has two stages of batch norm, a 5×5 convolution and pooling, then two linear layers with dropout. At 28×28
pixels it has 1.66 million parameters, which is slow on a CPU; on the 8×8 digits of plywise the same layout
has a ninth of that and trains in seconds. The paper (Zhao et al.) states about 1.7 million parameters, and as
far as we know no widths; we chose widths that fit. The example does not reproduce the paper's 99 % on MNIST.
The plots show the accuracy over epochs and some wrongly classified digits.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from plywise.data.digits import load_digits

# %%
# The layout works for square images of any size.


def make_toolkit_cnn(side: int) -> nn.Sequential:
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
    print(f"{side}×{side} pixels: {sum(p.numel() for p in make_toolkit_cnn(side).parameters()):,} parameters")

# %%
# The network trains for eight epochs with Adam.

torch.manual_seed(0)
train, validation, test = load_digits()
model = make_toolkit_cnn(8)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)


def predict_classes(x: torch.Tensor) -> torch.Tensor:
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
    curve.append((predict_classes(validation.x) == validation.y).double().mean().item())

predicted = predict_classes(test.x)
wrong = (predicted != test.y).nonzero()[:, 0]
print(f"validation accuracy after 1 epoch {curve[0]:.3f}, after {len(curve)} {curve[-1]:.3f}")
print(f"{len(wrong)} of {len(test.y)} test digits wrong: accuracy {1 - len(wrong) / len(test.y):.3f}")

# %%
# The accuracy after each epoch, and up to eight of the wrongly classified digits.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(range(1, len(curve) + 1), curve, "o-")
left.set(xlabel="epochs of training", ylabel="accuracy on validation digits", title="Training")
tiles = torch.zeros(2, 4, 12, 10)
for position, index in enumerate(wrong[:8].tolist()):
    row, column = divmod(position, 4)
    tiles[row, column, 3:11, 1:9] = test.x[index].reshape(8, 8)
    label = f"{int(test.y[index])}, not {int(predicted[index])}"
    right.text(10 * column + 4.5, 12 * row + 1, label, color="white", ha="center", va="center", fontsize=9)
right.imshow(tiles.permute(0, 2, 1, 3).reshape(24, 40), cmap="gray")
right.set(title="Wrongly classified digits", xticks=[], yticks=[])
plt.show()
