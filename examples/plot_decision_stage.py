"""
Stopping early with a decision stage
====================================

A ConvNet trains on digits. After each epoch two things decide what a test digit is: the network's largest
probability, and a support vector machine that has learned from the softmax vectors of the training digits.
While the network is half trained, its probabilities say more than which one is largest, and the support
vector machine is far ahead; at the end they nearly agree. The network learns slowly here. Where it learns
fast, nothing is saved: ``benchmarks/decision_stage.py`` measures both.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from plywise.data.digits import Split, load_digits
from plywise.nn import DecisionStage

EPOCHS = 15
train, _, test = (Split(part.x.reshape(-1, 1, 8, 8), part.y) for part in load_digits())
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)


def share_right(decided: Tensor) -> float:
    return (decided == test.y).double().mean().item()


# %%
# Each epoch has a new stage: fitting it takes one forward pass and the classifier's own fit.

network, stage, agreement = [], [], []
for _ in range(EPOCHS):
    for rows in torch.randperm(len(train.y)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        largest = model(test.x).argmax(1)
    decided = DecisionStage(model, SVC()).fit([(train.x, train.y)]).predict(test.x)
    network.append(share_right(largest))
    stage.append(share_right(decided))
    agreement.append((largest == decided).double().mean().item())

for epoch in (1, 3, EPOCHS):
    right = f"largest probability {network[epoch - 1]:.3f}, decision stage {stage[epoch - 1]:.3f}"
    print(f"epoch {epoch:2}: {right}, they agree on {agreement[epoch - 1]:.1%}")

# %%
# Accuracy over epochs.

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
epochs = range(1, EPOCHS + 1)
axis.plot(epochs, network, "s--", label="largest probability")
axis.plot(epochs, stage, "o-", label="support vector machine on the softmax vector")
axis.set(xlabel="epochs of training", ylabel="accuracy on test digits", ylim=(0, 1))
axis.legend(loc="lower right")
plt.show()
