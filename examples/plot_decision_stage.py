"""
Stopping early with a decision stage
====================================

This example adds a support vector machine to a convolutional network as its decision stage, and compares the
two after each epoch. The network predicts the class with the largest probability; the support vector machine
is fitted to the softmax vectors of the training digits. While the network is only partly trained, its
probabilities contain more information than which of them is the largest, and the support vector machine is
far ahead; at the end both nearly agree. This network learns slowly. For a network that learns fast, a
decision stage saves nothing: ``benchmarks/decision_stage.py`` measures both cases.
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


def compute_accuracy(predicted: Tensor) -> float:
    return (predicted == test.y).double().mean().item()


# %%
# After each epoch a new stage is fitted. This costs one forward pass over the training digits and the fit of
# the classifier.

network_accuracy, stage_accuracy, agreement = [], [], []
for _ in range(EPOCHS):
    for rows in torch.randperm(len(train.y)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        largest = model(test.x).argmax(1)
    predicted = DecisionStage(model, SVC()).fit([(train.x, train.y)]).predict(test.x)
    network_accuracy.append(compute_accuracy(largest))
    stage_accuracy.append(compute_accuracy(predicted))
    agreement.append((largest == predicted).double().mean().item())

for epoch in (1, 3, EPOCHS):
    probability, machine = network_accuracy[epoch - 1], stage_accuracy[epoch - 1]
    accuracies = f"largest probability {probability:.3f}, decision stage {machine:.3f}"
    print(f"epoch {epoch:2}: {accuracies}, they agree on {agreement[epoch - 1]:.1%}")

# %%
# The test accuracy of both after each epoch.

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
epochs = range(1, EPOCHS + 1)
axis.plot(epochs, network_accuracy, "s--", label="largest probability")
axis.plot(epochs, stage_accuracy, "o-", label="support vector machine on the softmax vector")
axis.set(xlabel="epochs of training", ylabel="accuracy on test digits", ylim=(0, 1))
axis.legend(loc="lower right")
plt.show()
