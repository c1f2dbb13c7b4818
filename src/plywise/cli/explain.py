"""`plywise explain`: what a rule would do to the user's own model, layer by layer."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from plywise.cli.console import console, table
from plywise.engine.explain import format_bytes, format_cost, format_reason
from plywise.errors import PlywiseError
from plywise.training.config import literal

HEADINGS = ("layer", "type", "weight", "treatment", "why", "memory", "cost")

if TYPE_CHECKING:
    from torch import nn

    from plywise.engine.rule import Rule


def explain(
    factory: str,
    *,
    rule: str = "ProxProp",
    set: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    layers: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    batch_size: int = 128,
) -> None:
    """Show what a rule does to each layer of your model, why, and what it costs.

    Args:
        factory: where your model is, as module:name; a function that makes it, or the model itself.
            Modules in the current directory are found.
        rule: name of the rule (see `plywise methods`), or module:name of a class of yours.
        set: a hyper-parameter of the rule, as name=value; may be repeated.
        layers: handle only layers whose name matches this pattern; may be repeated.
        batch_size: samples a batch, for the cost.
    """
    made = make_rule(rule, set)
    if batch_size < 1:
        raise PlywiseError(f"--batch-size must be at least 1, not {batch_size}.", see="error-command")
    model = load_model(factory)
    explanation = made.attach(model, layers=list(layers) or None).explain(batch_size)
    shown = table(*HEADINGS, title=explanation.title, numbers=("memory", "cost"))
    for row in explanation.rows:
        shown.add_row(
            row.name or "(model)",
            row.type,
            row.shape,
            row.treatment,
            format_reason(row),
            format_bytes(row),
            format_cost(row),
        )
    console().print(shown)
    console().print(
        "memory, cost: extra, while the layer's backward runs, and over its forward and backward."
    )


def make_rule(name: str, settings: tuple[str, ...]) -> Rule:
    """The rule called ``name`` with ``settings`` of the form name=value."""
    from plywise._util.suggest import suggestion
    from plywise.registry.resolve import resolve_rule

    rule_class: Any = resolve_rule(name)
    known = tuple(field.name for field in fields(rule_class))
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise PlywiseError(
                f"--set needs name=value, as in --set tau=2, not {setting!r}.", see="error-command"
            )
        if key not in known:
            hint = f"{suggestion(key, known)}It has: {', '.join(known) or 'none at all'}."
            raise PlywiseError(
                f"{rule_class.__name__} has no hyper-parameter {key!r}. {hint}", see="error-command"
            )
        values[key] = literal(text)
    try:
        rule: Rule = rule_class(**values)
    except (ValueError, TypeError) as error:
        raise PlywiseError(str(error), see="error-command") from error
    return rule


def load_model(address: str) -> nn.Module:
    """The model that ``module:name`` makes, or is."""
    from torch import nn

    from plywise._util.import_path import load
    from plywise.registry.resolve import make_model

    found = load(address, "your model")
    if not isinstance(found, nn.Module):
        found = make_model(address)
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise PlywiseError(
            f"{address} returned an object of type {kind}, not a torch.nn.Module.", see="error-address"
        )
    return found
