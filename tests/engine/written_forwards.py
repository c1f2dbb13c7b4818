"""A network whose forward a test writes, and inputs for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Parameters by name, and a forward that a test writes."""

    def __init__(self, forward: Forward, **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = forward
        for name, part in parts.items():
            made = part if isinstance(part, nn.Module) else nn.Parameter(0.3 * torch.randn(part))
            setattr(self, name, made)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
