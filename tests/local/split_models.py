"""Models to split, and what tests of splitting ask of blocks."""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """The usual one for CIFAR: pooling, flatten and dropout are functions in forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8, 1))
        self.layer3 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        out = F.dropout(out, 0.3, training=self.training)
        return self.linear(out)


class Tensors(nn.Module):
    """Parameters and buffers used in forward itself, an argument with a default, a layer that comes twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.randn(8))
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.last = nn.Linear(8, 3)

    def forward(self, x, mask=None):
        self.calls.add_(1)
        shift = self.shift
        x = self.layers[0](x * self.scale)
        if mask is not None:
            x = x * mask
        rows, _ = x.shape
        return self.last(torch.tanh(self.layers[1](self.layers[1](x.reshape(rows, 8)))) + shift)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


class Doubles(nn.Module):
    """Writes into what it gets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x.mul_(2) * self.weight


class Noisy(nn.Module):
    """Does another thing in train mode: cannot become one graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x = x + torch.randn_like(x)
        return self.second(x)


def mlp():
    parts = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8)]
    return nn.Sequential(
        *parts, nn.Sequential(nn.ELU(), nn.Sequential(nn.Linear(8, 6), nn.ELU())), nn.Linear(6, 3)
    )


def reused_activation():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8), relu)


def nested_noise():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Noisy(), nn.ReLU()), nn.Linear(8, 3))


MODELS = {
    "mlp": (mlp, (8,), 5),
    "reused activation": (reused_activation, (8,), 3),
    "resnet": (ResNet, (3, 16, 16), 9),
    "tensors": (Tensors, (8,), 3),
    "nested noise": (nested_noise, (8,), 3),
}
CASES = [(name, k) for name, (_, _, most) in MODELS.items() for k in range(1, most + 1, 2 if most > 5 else 1)]


def make(name):
    build, shape, _ = MODELS[name]
    return build(), torch.randn(6, *shape)


def chain(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def owners(blocks):
    """The block of each parameter, by name."""
    return {name: number for number, block in enumerate(blocks) for name, _ in block.named_parameters()}
