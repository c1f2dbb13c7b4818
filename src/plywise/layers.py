"""What a layer type must tell: its rows of A, its rows of Δ, and its gradient as one matrix.

A layer is *supported* when its forward is linear in its weights, ``z = A Wᵀ + b`` for some rows ``A``
made from its input. ``Linear`` has its inputs as rows, a convolution its patches. Everything else
(the rules, the solvers, the capture) speaks of ``A``, ``W`` and ``Δ`` only.

Shapes: ``g`` groups, ``n`` rows, ``d`` inputs and ``m`` outputs of one group. A linear layer has one
group. To support another type, subclass `LayerType` and call `register_layer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class LayerType(ABC):
    """How to read one type of layer as the linear map ``z = A Wᵀ + b``.

    Subclasses are stateless: every method receives the module. The statistics have a slow definition
    here, by `rows`; override one where the type knows a cheaper way.
    """

    weight_name = "weight"
    bias_name = "bias"
    rows_are_inputs = False
    """Whether A is the input itself (reshaped), so that what A hears is what the layer below hears."""

    def groups(self, module: nn.Module) -> int:
        """Number of independent linear maps side by side (grouped convolution); 1 by default."""
        return 1

    def linear_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """The tensor that the linear map reads, from the module's input (e.g. with a batch dimension).

        Runs under autograd, so what it does to ``x`` is differentiated as usual.
        """
        return x

    @abstractmethod
    def rows(self, module: nn.Module, a: Tensor) -> Tensor:
        """Rows ``A`` of shape (g, n, d), without a column for the bias."""

    @abstractmethod
    def delta_rows(self, module: nn.Module, delta: Tensor) -> Tensor:
        """The gradient at the output as rows, (g, n, m), in the order of `rows`."""

    @abstractmethod
    def from_delta_rows(self, module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
        """Inverse of `delta_rows`; ``like`` is a tensor of the output's shape."""

    def scale_rows(self, module: nn.Module, delta: Tensor, factors: Tensor) -> Tensor:
        """Δ with row i multiplied by ``factors[:, i]``, factors (g, n)."""
        rows = self.delta_rows(module, delta) * factors.unsqueeze(2)
        return self.from_delta_rows(module, rows, delta)

    @abstractmethod
    def weight_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """``ΔᵀA`` in the shape of the weight: what autograd would return."""

    @abstractmethod
    def input_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """``ΔW`` in the shape of ``a``: what autograd would send down."""

    def bias_gradient(self, module: nn.Module, delta: Tensor) -> Tensor:
        """``Δᵀ1``, (outputs,): the gradient's sum over all rows."""
        return delta.reshape(-1, delta.shape[-1]).sum(0)

    def apply(self, module: nn.Module, a: Tensor, weight: Tensor) -> Tensor:
        """``A Wᵀ`` in the shape of the output, without the bias (used by iterative solvers)."""
        matrix = weight.reshape(self.groups(module), -1, self.width(module, weight))
        return (self.rows(module, a) @ matrix.mT).reshape(*a.shape[:-1], weight.shape[0])

    def width(self, module: nn.Module, weight: Tensor) -> int:
        """``d``, the number of inputs that one output of a group reads."""
        return weight[0].numel()

    def row_count(self, module: nn.Module, delta: Tensor) -> int:
        """``n``, the number of rows in this batch, from the gradient at the output."""
        return delta.numel() // max(delta.shape[-1], 1)

    def gram(self, module: nn.Module, a: Tensor) -> Tensor:
        """``AᵀA``, (g, d, d); only its lower triangle is promised."""
        rows = self.rows(module, a)
        return lower_product(rows.mT)

    def sums(self, module: nn.Module, a: Tensor) -> Tensor:
        """Column sums of ``A``, (g, d)."""
        return self.rows(module, a).sum(1)

    def sample(self, module: nn.Module, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """`gram` and `sums` of about every ``every``-th row along each axis of positions, and their number.

        ``turn`` counts the samples taken: over the turns, every position is seen equally often. Layers
        without positions give all rows.
        """
        return self.gram(module, a), self.sums(module, a), self.rows(module, a).shape[1]

    def square_norms(self, module: nn.Module, a: Tensor) -> Tensor:
        """``‖a_i‖²`` of each row, (g, n)."""
        return torch.linalg.vector_norm(self.rows(module, a), dim=2).square()

    def trace(self, module: nn.Module, a: Tensor) -> Tensor:
        """``‖A‖²_F`` of each group, (g,)."""
        return self.square_norms(module, a).sum(1)

    def weight_energy(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """``‖J‖²_F / dim(input)`` for ``J`` the map from one sample's input to its output, a scalar.

        It is the mean factor by which a random vector's squared size changes on its way down; for a
        linear layer ``‖W‖²_F / d``.
        """
        return torch.linalg.vector_norm(weight).square() / self.width(module, weight)


def thinned(sizes: Sequence[int], every: int, turn: int) -> list[slice]:
    """For each axis, every ``every``-th place from an offset; ``turn`` counts through the offsets.

    An axis shorter than ``every`` is kept whole.
    """
    slices = []
    for size in sizes:
        step = every if size >= every else 1
        slices.append(slice(turn % step, None, step))
        turn //= step
    return slices


BLOCK = 128  # rows of the Gram made at a time: large enough for full speed, small enough to skip work


def lower_product(rows: Tensor) -> Tensor:
    """Lower triangle of ``rows @ rows.mT`` for (g, k, w) rows; above it only whole blocks are exact.

    torch has no symmetric product (BLAS ``syrk``). Cholesky reads one triangle, so making the lower
    blocks alone saves almost half of the work.
    """
    size = rows.shape[1]
    if size <= 2 * BLOCK and rows.shape[0] > 1:  # many small groups: one batched product is faster
        return rows @ rows.mT
    gram = rows.new_zeros(rows.shape[0], size, size)
    for group, out in zip(rows, gram, strict=True):
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            torch.mm(group[start:stop], group[:stop].T, out=out[start:stop, :stop])
    return gram


class LinearType(LayerType):
    """``nn.Linear`` with inputs of any leading shape: (d), (B, d), (B, T, d), ..."""

    rows_are_inputs = True

    def rows(self, module: nn.Module, a: Tensor) -> Tensor:
        return a.reshape(1, -1, a.shape[-1])

    def delta_rows(self, module: nn.Module, delta: Tensor) -> Tensor:
        return delta.reshape(1, -1, delta.shape[-1])

    def from_delta_rows(self, module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def weight_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return delta.reshape(-1, delta.shape[-1]).T @ a.reshape(-1, a.shape[-1])

    def sample(self, module: nn.Module, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        # positions are the axes between the batch and the features: tokens, patches
        a = a[(slice(None), *thinned(a.shape[1:-1], every, turn))] if a.dim() > 2 else a
        return self.gram(module, a), self.sums(module, a), a.numel() // max(a.shape[-1], 1)

    def trace(self, module: nn.Module, a: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a).square().reshape(1)

    def input_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return delta @ weight


_REGISTRY: dict[type[nn.Module], LayerType] = {}


def register_layer(module_type: type[nn.Module], layer_type: LayerType) -> None:
    """Teach every rule to handle ``module_type`` (and its subclasses that keep its forward).

    Args:
        module_type: the class of the module, e.g. ``MyLowRankLinear``.
        layer_type: how to read it as a linear map.

    Raises:
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import torch, plywise as pw
        >>> class MyLinear(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return torch.nn.functional.linear(x, self.weight, self.bias)
        >>> pw.register_layer(MyLinear, pw.layers.LinearType())
        >>> model = torch.nn.Sequential(MyLinear(3, 2))
        >>> rule = pw.ProxProp().attach(model)
        >>> rule.explain().rows[0].handled
        True
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer needs a subclass of torch.nn.Module, not {module_type!r}.")
    if not isinstance(layer_type, LayerType):
        raise TypeError(f"register_layer needs an instance of plywise.layers.LayerType, not {layer_type!r}.")
    _REGISTRY[module_type] = layer_type


def registered_types() -> Iterator[type[nn.Module]]:
    """The module types that rules can handle."""
    return iter(_REGISTRY)


def layer_type_of(module: nn.Module) -> LayerType | str:
    """The `LayerType` that reads ``module``, or the reason why there is none.

    A subclass of a supported type is supported when it keeps the type's forward: with another forward
    its output need not be the linear map that the type describes.
    """
    cls = getattr(module, "cls_to_become", None) or type(module)  # a lazy layer becomes its plain type
    if "forward" in module.__dict__:
        return "its forward was replaced on the module itself"
    for base in cls.__mro__:
        if base in _REGISTRY:
            keeps = cls.forward is base.forward
            keeps &= getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)
            if keeps:
                return _REGISTRY[base]
            return f"{cls.__name__} overrides the forward of {base.__name__}; register it with register_layer"
    return f"{cls.__name__} is not a supported layer type"


register_layer(nn.Linear, LinearType())
