"""Which layers a rule handles, which it leaves to the optimizer, and why."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from plywise.capture import LayerHook
from plywise.errors import AttachError
from plywise.layers import LayerType, layer_type_of

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Iterable["Selector"]
"""Layers by name pattern (``"encoder.*"``), by type, by ``predicate(name, module)``, or any of several."""


@dataclass(frozen=True)
class Route:
    """What happens to one module that owns parameters.

    Attributes:
        name: qualified name in the model.
        kind: how a rule reads it, or None if it is left to the optimizer.
        reason: why.
    """

    name: str
    kind: LayerType | None
    reason: str


def route(
    model: nn.Module, layers: Selector | None, exclude: Selector | None, alone: bool = False
) -> list[tuple[nn.Module, Route]]:
    """Each module of ``model`` that owns parameters with its route, in the model's order.

    Args:
        model: the model.
        layers: handle only these; None for all.
        exclude: leave these to the optimizer.
        alone: leave layers that share their weight with another layer to the optimizer.

    Raises:
        AttachError: a name pattern matches no module.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for selector in (layers, exclude):
        _check_patterns(selector, modules)
    owners = _owners(modules)
    called_apart = {
        id(module.out_proj) for module in modules.values() if isinstance(module, nn.MultiheadAttention)
    }
    routes = []
    for name, module in modules.items():
        kind = layer_type_of(module)
        if isinstance(kind, str) and all(p is None for p in module._parameters.values()):
            continue
        if isinstance(kind, LayerType):
            why_not = _obstacle(name, module, kind, layers, exclude, owners, called_apart)
            if why_not is None and alone:
                why_not = _shared(name, owners[id(module._parameters[kind.weight_name])])
            if why_not is None:
                routes.append((module, Route(name, kind, "linear in its weights")))
                continue
        else:
            why_not = kind
        routes.append((module, Route(name, None, why_not)))
    return routes


def _obstacle(
    name: str,
    module: nn.Module,
    kind: LayerType,
    layers: Selector | None,
    exclude: Selector | None,
    owners: dict[int, list[tuple[str, nn.Module]]],
    called_apart: set[int],
) -> str | None:
    """Why a module of a supported type is left to the optimizer, or None."""
    weight = module._parameters.get(kind.weight_name)
    if weight is None:
        return "its weight is computed by a parametrization, not a parameter"
    if id(module) in called_apart:
        return "nn.MultiheadAttention uses its weight without calling it"
    if layers is not None and not selects(layers, name, module):
        return "not among the layers asked for"
    if exclude is not None and selects(exclude, name, module):
        return "excluded"
    for other_name, other in owners[id(weight)]:
        if isinstance(layer_type_of(other), str):
            return f"its weight is tied with {other_name!r} ({type(other).__name__}), which is not supported"
    for hook in module._forward_hooks.values():
        if isinstance(hook, LayerHook):
            raise AttachError(
                f"Layer {name!r} is handled by a rule already. Detach that rule first (rule.detach()), or "
                f"leave the layer to it: attach(..., exclude={name!r}).",
                see="attach-twice",
            )
    return None


def _shared(name: str, owners: list[tuple[str, nn.Module]]) -> str | None:
    others = [repr(other) for other, _ in owners if other != name]
    return f"its weight is shared with {others[0]}: a statistic belongs to one layer" if others else None


def _owners(modules: dict[str, nn.Module]) -> dict[int, list[tuple[str, nn.Module]]]:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def selects(selector: Selector, name: str, module: nn.Module) -> bool:
    """Whether ``selector`` picks this module."""
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(name, module))
    return any(selects(one, name, module) for one in selector)


def _check_patterns(selector: Selector | None, modules: dict[str, nn.Module]) -> None:
    if isinstance(selector, str):
        if not any(fnmatchcase(name, selector) for name in modules):
            names = ", ".join(repr(name) for name in list(modules)[1:9])
            raise AttachError(
                f"The layer pattern {selector!r} matches nothing. The model has {names} ...",
                see="attach-pattern",
            )
    elif selector is not None and not isinstance(selector, type) and not callable(selector):
        for one in selector:
            _check_patterns(one, modules)


def plain_name(name: str) -> str:
    """A module's name without the wrapper of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
