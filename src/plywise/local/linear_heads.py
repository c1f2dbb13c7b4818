"""Linear heads on features that do not learn, trained by gradient or in closed form."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import require_positive
from plywise.errors import BlockError
from plywise.numerics.products import BLOCK
from plywise.numerics.products import mirror_lower as mirrored


class LinearHead(nn.Module, ABC):
    """Scores of the classes by one linear map, without bias, of a block's features; abstract."""

    @abstractmethod
    def loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Return the loss on a batch; with its graph, if the head learns by gradient."""

    def take_in(self, features: Tensor, y: Tensor) -> None:
        """Learn a training batch in closed form, if the head does so."""

    @abstractmethod
    def as_module(self) -> nn.Module:
        """Return a plain module from features to scores (N, C)."""

    def fit_to(self, parameter: Tensor) -> None:
        """Go where a block's parameter is, and take on its dtype."""
        self.to(parameter)


class GradientHead(LinearHead):
    """A linear head that learns by cross-entropy and an optimizer.

    CaFo's settings are Adam with ``eps=1e-4``.

    Args:
        shape: of one sample's features.
        num_classes: number of classes, C.
    """

    def __init__(self, shape: torch.Size, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.numel(), num_classes, bias=False)

    def loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.linear(features.flatten(1)), y)

    def as_module(self) -> nn.Module:
        """Return the head's own linear layer, after flattening."""
        return nn.Sequential(nn.Flatten(), self.linear)


class RidgeHead(LinearHead):
    """A linear head in closed form: ``(FᵀF + λI) W = FᵀY``, sums over all training batches so far.

    The sums are kept in float64 and solved when the weights are needed. λ is relative to the mean of the
    diagonal of ``FᵀF``, so that W depends on means over all samples only: their order makes no difference,
    and neither does a second pass over all of them.

    The loss is the squared error of weights that are solved again each time the number of samples has
    doubled, first when there are as many samples as features. Until then it is the error of zero weights.

    Args:
        shape: of one sample's features.
        num_classes: number of classes, C.
        ridge: λ relative to the mean diagonal of FᵀF. CaFo has none. Default 1e-2.
        max_features: the sums take ``8 d²`` bytes for d features: 512 MiB for the 8192 that CaFo's blocks
            have on CIFAR-10. Where there would be more, maps of features (channels first) are averaged over
            squares, the smallest that suffice. Default 8192.

    Raises:
        BlockError: there are more features than ``max_features``, and no map to average over.
        ValueError: ``ridge`` is not a positive number.

    Example:
        >>> head = RidgeHead(torch.Size([2]), num_classes=2, ridge=1e-9)
        >>> head.take_in(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        >>> head.solution().round(decimals=4)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """

    gram: Tensor
    cross: Tensor
    count: Tensor
    weight: Tensor
    solved: Tensor
    _answer: Tensor | None

    def __init__(
        self, shape: torch.Size, num_classes: int, *, ridge: float = 1e-2, max_features: int = 8192
    ) -> None:
        super().__init__()
        require_positive(self, ridge=ridge)
        self.ridge = ridge
        self.pool = _pool(shape, max_features)
        features = self.pool(torch.zeros(1, *shape)).numel()
        sums = torch.zeros(features, num_classes, dtype=torch.float64)
        self.register_buffer("gram", sums.new_zeros(features, features))  # FᵀF, lower triangle
        self.register_buffer("cross", sums)  # FᵀY
        self.register_buffer("count", torch.tensor(0))  # samples in the sums
        self.register_buffer("weight", torch.zeros_like(sums))  # what the loss is measured by
        self.register_buffer("solved", torch.tensor(0))  # samples in `weight`
        self.register_buffer("_answer", None, persistent=False)  # the solution, until the sums change

    @torch.no_grad()
    def loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared error (see the class)."""
        rows, targets = self._rows(features, y)
        return F.mse_loss(rows @ self.weight, targets).to(features.dtype)

    @torch.no_grad()
    def take_in(self, features: Tensor, y: Tensor) -> None:
        """Add a training batch to the sums."""
        rows, targets = self._rows(features, y)
        for start in range(0, rows.shape[1], BLOCK):  # rows of the Gram up to the diagonal
            stop = start + BLOCK
            self.gram[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        self.cross.addmm_(rows.T, targets)
        self.count += len(rows)
        self._answer = None
        if int(self.count) >= max(2 * int(self.solved), rows.shape[1]):
            self.weight.copy_(self.solution())
            self.solved.copy_(self.count)

    def _rows(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool(features).flatten(1).double(), F.one_hot(y, self.cross.shape[1]).double()

    @torch.no_grad()
    def solution(self) -> Tensor:
        """W (d, C) in float64 from the sums at hand; zeros before there are any."""
        if self._answer is None:
            self._answer = self._solve()
        return self._answer

    def _solve(self) -> Tensor:
        damped = self.gram.clone()
        shift = self.ridge * damped.diagonal().mean()
        damped.diagonal().add_(shift.clamp_min(torch.finfo(torch.float32).tiny))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return torch.cholesky_solve(self.cross, factor)
        # singular up to rounding: leave out what no sum of features says anything about
        inverse: Tensor = torch.linalg.pinv(mirrored(damped), hermitian=True)
        return inverse @ self.cross

    def as_module(self) -> nn.Module:
        """Return a linear map with the weights of this moment."""
        return nn.Sequential(self.pool, nn.Flatten(), FixedLinear(self.solution()))

    def fit_to(self, parameter: Tensor) -> None:
        """Go where a block's parameter is; the sums stay in float64."""
        self.to(parameter.device)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._answer = None
        super()._load_from_state_dict(*args)


class FixedLinear(nn.Module):
    """``F W`` in the dtype of the features."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (N, C)."""
        return features @ self.weight.to(features.dtype)


_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def _pool(shape: torch.Size, max_features: int) -> nn.Module:
    """Averages maps of features over the smallest squares that leave no more than ``max_features``."""
    if shape.numel() <= max_features:
        return nn.Identity()
    sizes = shape[1:]
    if len(sizes) in _POOLS:
        for side in range(2, max(sizes) + 1):
            if shape[0] * torch.Size(-(-size // side) for size in sizes).numel() <= max_features:
                return _POOLS[len(sizes)](side, ceil_mode=True)
    raise BlockError(
        f"A block hands on {shape.numel()} features, {tuple(shape)} a sample. A ridge head sums them in a "
        f"matrix of {8e-9 * shape.numel() ** 2:.1f} GB; this one takes at most {max_features} features, and "
        "there is no map of positions that it could average over. Pool in the block, or raise max_features."
    )
