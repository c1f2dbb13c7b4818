"""Decides which parameters a rule may take and which it leaves to the optimizer, with the reasons."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm, rnn

from plywise._util.checks import describe_kind, is_list
from plywise.engine.explain import EXCLUDED, NOT_ASKED_FOR
from plywise.engine.sites import Owner, ParameterEntry
from plywise.errors import AttachError

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Iterable["Selector"]
"""Layers by name pattern (``"encoder.*"``), by type, by ``predicate(name, module)``, or any of several."""

KINDS = ("linear", "conv", "experts", "embedding", "norm", "bilinear")
"""Kinds of linear maps; see `plywise.engine.maps`."""

MATRICES = ("linear", "conv", "experts", "bilinear")
"""The kinds that rules take by default: every weight that is a matrix of inputs and outputs."""

Kinds = str | Iterable[str] | None

KNOWN: list[tuple[tuple[type[nn.Module], ...], str, tuple[str, ...]]] = [
    ((nn.Linear,), "linear", ("weight",)),
    ((conv._ConvNd,), "conv", ("weight",)),
    ((nn.Embedding, nn.EmbeddingBag), "embedding", ("weight",)),
    ((nn.Bilinear,), "bilinear", ("weight",)),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), "norm", ("weight",)),
    ((batchnorm._BatchNorm, instancenorm._InstanceNorm), "norm", ("weight",)),
    (
        (nn.MultiheadAttention,),
        "linear",
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
]
"""Modules of torch whose forward is known: the kind of their calls, and the weights that these use."""

IN_OUT = ("transformers.pytorch_utils", "Conv1D")
"""Module and name of a class, known without its import, that is linear with a weight (inputs, outputs)."""

FUSED = (rnn.RNNBase, rnn.RNNCellBase)
"""Modules whose kernels hide their calls."""


def resolve_kinds(kinds: Kinds, default: tuple[str, ...]) -> frozenset[str]:
    """Return the kinds of maps that a rule takes.

    Args:
        kinds: ``"all"``, one kind, several, or None for the default.
        default: the rule's own choice.

    Raises:
        ValueError: a kind is unknown.
    """
    if kinds is None:
        return frozenset(default)
    if kinds == "all":
        return frozenset(KINDS)
    chosen: list[str] = [kinds] if isinstance(kinds, str) or not is_list(kinds) else list(kinds)  # type: ignore[list-item]
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown or not chosen:
        raise ValueError(
            f"kinds must be 'all' or some of {', '.join(map(repr, KINDS))}, not "
            f"{', '.join(map(repr, unknown)) or 'an empty list'}. To choose layers by name or class, use "
            "layers=... or exclude=...."
        )
    return frozenset(chosen)


def collect_parameters(
    model: nn.Module,
    kinds: frozenset[str],
    layers: Selector | None = None,
    exclude: Selector | None = None,
    unshared_only: bool = False,
) -> list[ParameterEntry]:
    """Return an entry for each parameter of ``model``, in the model's order.

    Args:
        model: the model.
        kinds: the kinds of maps that the rule takes.
        layers: the rule may take only these; None for all.
        exclude: leave these to the optimizer.
        unshared_only: leave weights that several layers share to the optimizer.

    Raises:
        AttachError: a name pattern matches no module and no parameter, or a selector is of no known kind.
    """
    modules = {strip_wrappers(name): module for name, module in model.named_modules()}
    parameters = [strip_wrappers(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    for selector in (layers, exclude):
        _check_selector(selector, modules, parameters)
    entries: dict[int, ParameterEntry] = {}
    for path, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            entry = entries.get(id(parameter))
            layer, name = _find_layer(path, attribute)
            if entry is None:
                entry = entries[id(parameter)] = ParameterEntry(
                    f"{path}.{attribute}" if path else attribute,
                    layer,
                    name,
                    weakref.ref(parameter),
                    [],
                    may_scale="norm" in kinds,
                )
            entry.owners.append(Owner(layer, weakref.ref(module), attribute))
            _restrict(entry, layer, modules.get(layer, module), attribute, kinds, layers, exclude)
    for entry in entries.values():
        owners = list(dict.fromkeys(owner.path for owner in entry.owners))
        if unshared_only and len(owners) > 1 and not entry.excluded:
            names = " and ".join(map(repr, owners[:2]))
            entry.excluded = f"its weight is shared by {names}: a statistic belongs to one layer"
    return list(entries.values())


def _find_layer(path: str, attribute: str) -> tuple[str, str]:
    """Return the layer and the name of its weight; originals of a parametrization belong to the layer."""
    marker = ".parametrizations."
    if marker in f".{path}":
        parent, _, rest = f".{path}".rpartition(marker)
        return parent.removeprefix("."), rest.split(".")[0]
    for suffix in ("_orig", "_g", "_v"):  # torch's hooks: pruning, spectral norm, weight norm
        if attribute == f"weight{suffix}":
            return path, "weight"
    return path, attribute


def _restrict(
    entry: ParameterEntry,
    path: str,
    module: nn.Module,
    attribute: str,
    kinds: frozenset[str],
    layers: Selector | None,
    exclude: Selector | None,
) -> None:
    kind, why = predict_kind(module, attribute)
    entry.expected = entry.expected or kind
    names = path, entry.name
    if layers is not None and not selects(layers, names, module):
        entry.excluded = entry.excluded or NOT_ASKED_FOR
    elif exclude is not None and selects(exclude, names, module):
        entry.excluded = EXCLUDED
    elif why:
        entry.excluded = entry.excluded or why
    elif kind and kind not in kinds:
        first, tied = entry.owners[0].path, f"its weight is tied with {path!r} ({type(module).__name__}), "
        reason = explain_kind(kind)
        entry.excluded = entry.excluded or (reason if first == path else tied + reason)


def is_handled(entry: ParameterEntry, but: object = None) -> str | None:
    """Return the path of a module through which another attached rule than ``but`` handles this parameter."""
    for path, ref, _ in entry.owners:
        module = ref()
        for hook in () if module is None else module._forward_pre_hooks.values():
            capture = getattr(hook, "capture", None)
            if capture is not None and capture is not but and capture.takes(entry.parameter()):
                return path
    return None


def refuse_nothing(
    entries: list[ParameterEntry], rule_name: str, model: nn.Module, kinds: frozenset[str]
) -> None:
    """Raise AttachError if the rule may take none of these parameters."""
    if any(entry.is_candidate or entry.is_vector_of_weights for entry in entries):
        return
    left = [entry for entry in entries if entry.why_left]
    said = dict.fromkeys((entry.layer, entry.why_left) for entry in left)  # once for all weights of a layer
    reasons = "; ".join(f"{layer!r}: {why}" if layer else str(why) for layer, why in list(said)[:6])
    nothing = "its parameters are biases" if entries else "it has no parameters"
    raise AttachError(
        f"{rule_name} finds no layer to handle in this {type(model).__name__} "
        f"({reasons or nothing}). It handles calls of linear maps of the kinds "
        f"{', '.join(sorted(kinds))}; teach it others with plywise.register_map.",
        see="attach-no-layer",
    )


def refuse_handled(entries: list[ParameterEntry]) -> None:
    """Raise AttachError if another rule handles one of these parameters."""
    for entry in entries:
        path = None if entry.why_left else is_handled(entry)
        if path is not None:
            raise AttachError(
                f"Layer {path!r} is handled by a rule already. Detach that rule first (rule.detach()), or "
                f"leave the layer to it: attach(..., exclude={path!r}).",
                see="attach-twice",
            )


def explain_kind(kind: str) -> str:
    """Return why a kind that the rule does not take is left to the optimizer."""
    return f"its kind, {kind!r}, is left to the optimizer unless attach(..., kinds=...) names it"


def predict_kind(module: nn.Module, attribute: str) -> tuple[str, str]:
    """Return the kind of map that a module's own code is known to call with a parameter, or why it cannot.

    Returns:
        The kind and "", or "" and a reason, or two empty strings if only the first batch will show the kind.
    """
    if isinstance(module, FUSED) and _keeps_forward(module, type(module)):
        return "", (
            f"the fused kernels of nn.{type(module).__name__} hide their calls: plywise.nn.unroll(model) "
            "makes a twin that the rule can handle"
        )
    cls = getattr(module, "cls_to_become", None) or type(module)  # a lazy layer becomes its plain type
    for types, kind, names in KNOWN:
        if issubclass(cls, types) and attribute in names and _keeps_forward(module, cls):
            return kind, ""
    return ("linear" if is_in_out(cls) and attribute == "weight" else ""), ""


def is_in_out(cls: type[nn.Module]) -> bool:
    """Return whether this is transformers' ``Conv1D``, or a subclass that keeps its forward."""
    forward = getattr(cls, "forward", None)
    named = [base for base in cls.__mro__ if (base.__module__, base.__name__) == IN_OUT]
    return any(base.__dict__.get("forward") is forward for base in named)


def _keeps_forward(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether the forward is that of torch: another one need not use the weight in the same call."""
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return False
    return all(
        getattr(cls, name, None) is None or getattr(cls, name).__module__.startswith("torch.")
        for name in ("forward", "_conv_forward")
    )


def selects(selector: Selector, names: tuple[str, str], module: nn.Module) -> bool:
    """Return whether ``selector`` picks a parameter, by the names of its module and itself, or its module."""
    if isinstance(selector, str):
        return matches(selector, names)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(names[0], module))
    return any(selects(part, names, module) for part in selector)


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a pattern is one of these names, or matches one."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def is_empty(selector: Selector | None) -> bool:
    """Return whether ``selector`` is a list of nothing."""
    return isinstance(selector, list | tuple | set) and not selector


def hold_selector(selector: Selector | None) -> Selector | None:
    """Return a selector that can be read again and again: an iterator becomes a list."""
    return list(selector) if isinstance(selector, Iterator) else selector


def _check_selector(
    selector: Selector | None, modules: Mapping[str, nn.Module], parameters: Sequence[str]
) -> None:
    """Raise AttachError unless a selector's patterns match something, and its other parts can select.

    Args:
        selector: what the user gave as ``layers`` or ``exclude``.
        modules: the model's modules by name; the first is the model.
        parameters: the names of its parameters.
    """
    if isinstance(selector, str):
        names = [*modules, *parameters]
        if not matches(selector, names):
            some = ", ".join(map(repr, names[1:9]))
            raise AttachError(
                f"The layer pattern {selector!r} matches nothing. The model has {some} ...",
                see="attach-pattern",
            )
    elif isinstance(selector, nn.Module):  # callable, and yet no predicate
        name = next((name for name, module in modules.items() if module is selector), None)
        raise _refuse_selector(selector, f" Write {name!r} in its place." if name else "")
    elif selector is not None and not isinstance(selector, type) and not callable(selector):
        if isinstance(selector, Tensor) or not isinstance(selector, Iterable):
            raise _refuse_selector(selector, "")
        for part in selector:
            _check_selector(part, modules, parameters)


def _refuse_selector(selector: object, advice: str) -> AttachError:
    """Return the error for what chooses no layers."""
    return AttachError(
        "layers= and exclude= take names of layers or parameters (with wildcards), classes of modules, "
        f"functions of (name, module), or a list of these, not {describe_kind(selector)}.{advice}",
        see="attach-pattern",
    )


def strip_wrappers(name: str) -> str:
    """Return a name without the wrappers of torch.compile, FSDP and activation checkpointing."""
    wrappers = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)
