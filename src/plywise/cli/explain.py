"""`plywise explain`: what a rule would do to the user's own model, layer by layer."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from plywise.cli.console import console, print_json, table
from plywise.cli.training import Switch
from plywise.engine.explain import Explanation, format_bytes, format_cost, format_reason
from plywise.errors import AddressError, CommandError, DataError, PlywiseError
from plywise.training.config import parse_settings

HEADINGS = ("layer", "type", "weight", "treatment", "why", "memory", "cost")

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from plywise.data.batches import Batch
    from plywise.engine.rule import Rule


def explain(
    model: Annotated[str, Parameter(alias="--factory")],
    *,
    rule: str = "ProxProp",
    set: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    layers: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    data: str | None = None,
    read: str = "",
    shape: str | None = None,
    step: str | None = None,
    batch_size: int = 128,
    json: Switch = False,
) -> None:
    """Show what a rule does to each layer of your model, why, and what it costs.

    With data, or the shape of a sample, a batch goes through the model, forward and backward: it shows
    memory and cost of every layer, and which calls use it. Without, those of linear layers alone are known.

    For example:

        plywise explain mine:make_model
        plywise explain mine:make_convnet --rule Foof --shape 3,32,32
        plywise explain mine:make_convnet --data mine.npz --batch-size 64
        plywise explain mine:make_gpt --data mine:make_data --step mine:step

    Args:
        model: where your model is, as module:name; a function that makes it, or the model itself.
            Modules in the current directory are found.
        rule: name of the rule (see `plywise methods`), or module:name of a class of yours.
        set: a hyper-parameter of the rule, as name=value; may be repeated.
        layers: handle only layers whose name matches this pattern; may be repeated.
        data: where a batch comes from, as `plywise bench` takes it: module:name, a .npz or a .csv file.
        read: how the data are read, where plywise would guess: header=yes or no and target=NAME (a column)
            for a .csv file, targets=classes or numbers, inputs=numbers, images or tokens; put commas between.
        shape: instead of data: the shape of one sample, as in 3,32,32; the batch is of random numbers.
        step: with data, module:name of your function of the model and a batch that returns the loss, for
            models that are called in another way; as for `plywise bench`.
        batch_size: samples a batch, for the cost.
        json: print it as JSON.
    """
    made = make_rule(rule, set)
    if batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, not {batch_size}.")
    network = load_model(model)
    if step is not None and data is None:
        raise CommandError("--step takes batches of --data: name them.")
    batch, guesses = _make_batch(data, read, shape, batch_size, is_whole=step is not None)
    attached = made.attach(network, _optimizer_for(made, network), layers=list(layers) or None)
    try:
        if batch is not None:
            _run_batch(model, network, batch, step, guesses)
        explanation = attached.explain(batch_size)
    finally:
        attached.detach()  # a model that exits has left calls captured
    if json:
        totals = {name: getattr(explanation, name) for name in ("share", "parameters", "frozen")}
        print_json({**vars(explanation), **totals, "summary": explanation.summary(), "guesses": guesses})
        return
    for guess in guesses:
        console().print(guess)
    _print_explanation(explanation)


def _print_explanation(explanation: Explanation) -> None:
    shown = table(*HEADINGS, numbers=("memory", "cost"))
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
    for sentence in explanation.summary():
        console().print(sentence)
    console().print(shown)
    console().print(
        "memory, cost: extra, while the layer's backward runs, and over its forward and backward."
    )


def _make_batch(
    data: str | None, read: str, shape: str | None, batch_size: int, is_whole: bool
) -> tuple[Batch | None, tuple[str, ...]]:
    """The inputs that go through the model, or whole batches for a step function, and what was guessed."""
    if data is not None and shape is not None:
        raise CommandError("--shape is instead of --data: give one of them.")
    if read and data is None:
        raise CommandError("--read is about --data: name them.")
    if data is not None:
        from plywise.data.reading import ReadOptions
        from plywise.data.sources import Reading
        from plywise.registry.resolve import resolve_parts

        options = ReadOptions.parse(read)
        # of a stream, one batch is read
        parts = resolve_parts(data, Reading(options, whole=is_whole, batch_size=batch_size, most=1))
        return next(iter(parts["train"].chunks(batch_size)))[0], parts.guesses
    if shape is None:
        return None, ()
    import torch

    sizes = [word.strip() for word in shape.replace("x", ",").split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in sizes):
        raise CommandError(
            f"--shape is the shape of one sample without the batch, as in 3,32,32, not {shape!r}."
        )
    return torch.randn(batch_size, *map(int, sizes)), ()


def _optimizer_for(rule: Rule, model: nn.Module) -> Optimizer | None:
    """Return an optimizer that never steps, for rules that cannot do without."""
    from torch.optim import SGD

    return SGD(model.parameters(), lr=0.0) if rule.remembers else None


def _run_batch(
    address: str, model: nn.Module, batch: Batch, step: str | None, guesses: tuple[str, ...]
) -> None:
    """One forward and backward pass, from the loss of the step or the sum of what the model returns."""
    from plywise.arena.workloads.own_calls import describe_batch
    from plywise.data.batches import TARGETS
    from plywise.data.models import call_model
    from plywise.data.own_data import explaining
    from plywise.registry.resolve import resolve_function

    take_step = resolve_function(step, "your step") if step else None
    with explaining(guesses):
        try:
            output = take_step(model, batch) if take_step else call_model(model, batch, TARGETS)
            _find_tensor(output).sum().backward()
        except PlywiseError:
            raise
        except Exception as error:  # the user's own code runs in there
            raise DataError(
                f"{address} failed on a batch of {describe_batch(batch)}: {type(error).__name__}: {error}"
            ) from error


def _find_tensor(output: Any) -> Tensor:
    """Return the first tensor that a model returns and that has a gradient."""
    if hasattr(output, "values") and not hasattr(output, "grad_fn"):
        output = tuple(output.values())
    parts = output if isinstance(output, list | tuple) else [output]
    for part in parts:
        if getattr(part, "requires_grad", False):
            return part
    raise TypeError(f"it returned {type(output).__name__}, with no tensor that has a gradient")


def make_rule(name: str, settings: tuple[str, ...]) -> Rule:
    """Return the rule called ``name`` with ``settings`` of the form name=value."""
    from plywise.local.settings import check_settings
    from plywise.registry.resolve import resolve_rule

    rule_class: Any = resolve_rule(name)
    values = parse_settings("--set", "--set tau=2", settings)
    check_settings(rule_class.__name__, values, (field.name for field in fields(rule_class)))
    try:
        rule: Rule = rule_class(**values)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    return rule


def load_model(address: str) -> nn.Module:
    """Return the model that ``module:name`` makes, or is."""
    from torch import nn

    from plywise._util.import_path import load
    from plywise.registry.resolve import make_model

    found = load(address, "your model")
    if not isinstance(found, nn.Module):
        found = make_model(address)
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise AddressError(f"{address} returned an object of type {kind}, not a torch.nn.Module.")
    return found
