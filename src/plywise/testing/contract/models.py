"""Small models, data and measurements shared by the contract's tests."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise.engine.health import ROUNDING
from plywise.engine.rule import Rule


class Net(nn.Module):
    """Layers by name, and a function of the net and its inputs that calls them."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._call = call

    def forward(self, *args: Any) -> Tensor:
        return self._call(self, *args)


def make_mlp(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Sequential:
    """Make an MLP 6 → 8 → 8 → 3."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def make_convnet(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Sequential:
    """Make a network with every kind of module that a rule marks or handles, on (B, 2, 6, 6)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).to(dtype)


MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (make_mlp, (6,)),
    "convnet": (make_convnet, (2, 6, 6)),
}


def make_batch(
    shape: tuple[int, ...] = (6,), n: int = 12, dtype: torch.dtype = torch.float32, seed: int = 2
) -> tuple[Tensor, Tensor]:
    """Make inputs and labels of a separable problem with three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    directions = torch.randn(3, x[0].numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = (x.flatten(1) @ directions.T).argmax(1)
    x = x + 0.5 * directions[y].reshape(x.shape)
    return x.to(dtype), y


def compute_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def compute_gradients(model: nn.Module, data: tuple[Tensor, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Compute the gradients of one batch alone."""
    model.zero_grad()
    (compute_loss(model, data) * scale).backward()
    return copy_gradients(model)


def copy_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copy the present gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def count_fallbacks(rule: Rule) -> int:
    """Count events, without updates that lost digits: a root amplifies what half precision has rounded."""
    return sum(rule.health.counts.values()) - rule.health.total(ROUNDING)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int
) -> list[float]:
    """Train, and return the loss before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compute_loss(model, data)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def step_by_closure(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], by_keyword: bool = False
) -> None:
    """Take a step with a closure that computes loss and gradients."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = compute_loss(model, data)
        loss.backward()
        return loss

    if by_keyword:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)


def save_and_load(value: Any, weights_only: bool = True) -> Any:
    """Write a value as torch does, and read it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@dataclass(frozen=True)
class Finding:
    """Whether something holds, with what a failing test says of it."""

    holds: bool
    words: str

    def __bool__(self) -> bool:
        return self.holds

    def __repr__(self) -> str:
        return self.words


def have_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> Finding:
    """Tell whether names and values are the same, bit for bit (NaN equals NaN)."""
    if left.keys() != right.keys():
        return Finding(False, f"only one side has {sorted(map(str, left.keys() ^ right.keys()))[:3]}")
    pairs = {name: (torch.as_tensor(left[name]), torch.as_tensor(right[name])) for name in left}
    differ = [
        name
        for name, values in pairs.items()
        if not torch.equal(*(value.nan_to_num(nan=12345.678) for value in values))
    ]
    if not differ:
        return Finding(True, "all numbers are the same, bit for bit")
    one, other = pairs[differ[0]]
    if one.shape != other.shape:
        how = f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
    else:
        how = f"by up to {float((one.double() - other.double()).abs().max()):.3g}"
    return Finding(False, f"{len(differ)} of {len(left)} tensors differ, first {differ[0]!r}, {how}")


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Assert that names are the same, and values up to ``tolerance`` of each tensor's largest entry."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert value.shape == other.shape, name
        if value.numel():
            size = float(other.abs().max())
            error = float((value - other).abs().max())
            assert error <= tolerance * max(size, 1e-300), (
                f"{name!r} differs by {error:.3g} from what is right"
            )


def are_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())
