"""Maps that users register: for modules whose forward is a linear map of their weight, but no known call."""

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.matmul import MatrixProduct
from plywise.errors import AttachError

MakeMap = Callable[[nn.Module], LinearMap]


@dataclass(frozen=True)
class Registration:
    """What a user has registered for a module type.

    Attributes:
        make_map: the map of one module.
        weight: name of its weight.
        bias: name of its bias, which it may lack.
        prepare: what happens to the input before the map (under autograd).
    """

    make_map: MakeMap
    weight: str
    bias: str
    prepare: Callable[[nn.Module, Tensor], Tensor]


_REGISTRY: dict[type[nn.Module], Registration] = {}


def register_map(
    module_type: type[nn.Module],
    map_: "LinearMap | MakeMap",
    *,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Teach every rule to read the forward of ``module_type`` as one linear map.

    Modules that call torch's own functions (`F.linear`, ``@``, `torch.einsum`, convolutions, ...) need no
    registration: these calls are captured. At the first use, the map is compared with the module's output and
    with autograd's gradient, for few rows and for many; a wrong map raises AttachError.

    Args:
        module_type: the class of the module; its subclasses that keep its forward are read alike.
        map_: the map, or a function that makes it from a module.
        weight: name of the module's parameter W, of shape (g · m, ...), d entries in the other dimensions.
        bias: name of its bias of shape (g · m,), which it may lack.

    Raises:
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import torch, plywise as pw
        >>> from plywise.engine.maps.matmul import MatrixProduct
        >>> class SlowLinear(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias
        >>> pw.register_map(SlowLinear, MatrixProduct())
        >>> model = SlowLinear(3, 2)
        >>> rule = pw.Backprop().attach(model)
        >>> model(torch.ones(4, 3)).sum().backward()
        >>> rule.explain().share
        1.0
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_map needs a subclass of torch.nn.Module, not {module_type!r}.")
    if isinstance(map_, LinearMap):
        fixed = map_
        make: MakeMap = lambda module: fixed  # noqa: E731
    elif callable(map_) and not inspect.isclass(map_):
        make = map_
    else:
        raise TypeError(
            f"register_map needs a plywise.LinearMap, or a function that makes one, not {map_!r}."
        )
    _REGISTRY[module_type] = Registration(make, weight, bias, lambda module, x: x)


class LayerType(ABC):
    """How to read one type of layer as a linear map, as plywise 0.1 wanted it; see `LinearMap` instead.

    Subclasses are stateless: every method receives the module.
    """

    weight_name = "weight"
    bias_name = "bias"
    rows_are_inputs = False

    def groups(self, module: nn.Module) -> int:
        """Return the number of independent linear maps side by side; 1 by default."""
        return 1

    def linear_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the tensor that the linear map reads, from the module's input."""
        return x

    @abstractmethod
    def rows(self, module: nn.Module, a: Tensor) -> Tensor:
        """Return the rows ``A`` of shape (g, n, d), without a column for the bias."""

    @abstractmethod
    def delta_rows(self, module: nn.Module, delta: Tensor) -> Tensor:
        """Return the gradient at the output as rows, (g, n, m), in the order of `rows`."""

    @abstractmethod
    def from_delta_rows(self, module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
        """Turn rows of Δ back into the output's shape, that of ``like``: the inverse of `delta_rows`."""

    @abstractmethod
    def weight_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` in the shape of the weight."""

    @abstractmethod
    def input_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW`` in the shape of ``a``."""


class LinearType(LayerType):
    """A linear layer with inputs of any leading shape."""

    rows_are_inputs = True

    def rows(self, module: nn.Module, a: Tensor) -> Tensor:
        """Return the input."""
        return a.reshape(1, -1, a.shape[-1])

    def delta_rows(self, module: nn.Module, delta: Tensor) -> Tensor:
        """Return Δ."""
        return delta.reshape(1, -1, delta.shape[-1])

    def from_delta_rows(self, module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape of the output."""
        return rows.reshape(like.shape)

    def weight_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA``."""
        return MatrixProduct().weight_gradient(a, delta, weight)

    def input_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW``."""
        return MatrixProduct().input_gradient(a, delta, weight)


class _BoundLayerType(LinearMap):
    """A `LayerType` and its module as a `LinearMap`."""

    kind: ClassVar[str] = "linear"
    sends_below: ClassVar[bool] = True

    def __init__(self, layer_type: LayerType, module: nn.Module) -> None:
        self._type = layer_type
        self._ref = weakref.ref(module)
        self.groups = layer_type.groups(module)
        self.rows_are_inputs = layer_type.rows_are_inputs  # type: ignore[misc]

    @property
    def _module(self) -> nn.Module:
        module = self._ref()
        assert module is not None
        return module

    def rows(self, a: Tensor) -> Tensor:
        return self._type.rows(self._module, a)

    def delta_rows(self, delta: Tensor) -> Tensor:
        return self._type.delta_rows(self._module, delta)

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return self._type.from_delta_rows(self._module, rows, like)

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return self._type.weight_gradient(self._module, a, delta, weight)

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return self._type.input_gradient(self._module, a, delta, weight)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        rows = self.rows(a)
        matrix = weight.reshape(self.groups, -1, rows.shape[2])
        product = rows @ matrix.mT
        like = product.transpose(0, 1).reshape(*a.shape[:1], -1)
        return self.from_delta_rows(product, like)

    def row_count(self, delta: Tensor) -> int:
        return self.delta_rows(delta).shape[1]


def register_layer(module_type: type[nn.Module], layer_type: LayerType) -> None:
    """Teach every rule to read ``module_type``, as plywise 0.1 had it; `register_map` is its successor.

    Args:
        module_type: the class of the module.
        layer_type: how to read it as a linear map.

    Raises:
        TypeError: an argument is of the wrong kind.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer needs a subclass of torch.nn.Module, not {module_type!r}.")
    if not isinstance(layer_type, LayerType):
        raise TypeError(f"register_layer needs an instance of plywise.layers.LayerType, not {layer_type!r}.")
    _REGISTRY[module_type] = Registration(
        lambda module: _BoundLayerType(layer_type, module),
        layer_type.weight_name,
        layer_type.bias_name,
        layer_type.linear_input,
    )


def find_registration(module: nn.Module) -> Registration | None:
    """Return what is registered for a module's type; None for subclasses with a forward of their own."""
    cls = type(module)
    if "forward" in module.__dict__:
        return None
    for base in cls.__mro__:
        if base in _REGISTRY:
            return _REGISTRY[base] if cls.forward is base.forward else None
    return None


def check_map(
    name: str, map_: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """Test a registered map against a call: its output, its gradient, its Gram, few rows and many.

    Raises:
        AttachError: they differ.
    """
    x, weight, output = x.detach().double(), weight.detach().double(), output.detach().double()
    generator = torch.Generator(device="cpu").manual_seed(0)
    for count in (1, len(x)) if x.dim() > 1 else (1,):
        a, made = (x[:count], output[:count]) if x.dim() > 1 else (x, output)
        delta = torch.randn(made.shape, generator=generator, dtype=torch.float64, device="cpu")
        delta = delta.to(made.device)
        rows, of_delta = map_.rows(a), map_.delta_rows(delta)
        matrix = weight.reshape(map_.groups, -1, rows.shape[2])
        plain = rows @ matrix.mT
        if bias is not None:
            plain = plain + bias.detach().double().reshape(map_.groups, 1, -1)
        gradient = (of_delta.mT @ rows).reshape(weight.shape)
        for what, found, wanted in (
            ("output", map_.from_delta_rows(plain, made), made),
            ("weight_gradient", map_.weight_gradient(a, delta, weight), gradient),
            ("gram", map_.gram(a).tril(), (rows.mT @ rows).tril()),
            ("from_delta_rows", map_.from_delta_rows(of_delta, delta), delta),
        ):
            _compare(name, map_, what, found, wanted)


def _compare(name: str, map_: LinearMap, what: str, found: Tensor, wanted: Tensor) -> None:
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    if found.shape == wanted.shape and float((found - wanted).abs().max()) <= 1e-3 * max(size, 1e-30):
        return
    raise AttachError(
        f"The map {type(map_).__name__} registered for layer {name!r} does not describe what the layer does: "
        f"its {what} differs from the module's own. Fix the map (see plywise.register_map), or leave the "
        f"layer out: attach(..., exclude={name!r}).",
        see="register-map",
    )
