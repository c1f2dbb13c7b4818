"""`plywise diagnose`: what stands in the way of training your model, layer by layer, and what to try."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from plywise._util.tables import format_number
from plywise.cli.console import console, print_json, table
from plywise.cli.training import Switch
from plywise.errors import BenchError, CommandError, PlywiseError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from plywise.arena.diagnostics.advice import Advice
    from plywise.arena.diagnostics.diagnosis import Diagnosis, LayerDiagnosis
    from plywise.arena.workload import Workload
    from plywise.data.parts import Data

NUMBERS = ("weights", "rows", "backward", "to last", "silent", "rate", "noise", "condition", "rank")
STRIKING = "bold yellow"
"""Style of unusual values; a star marks them where there are no colours."""
LEGEND = (
    "rows: of a sample. backward: root mean square of the loss gradient at the output; to last: its norm for "
    "a sample over the last layer's. silent: outputs where it is always 0. rate: a plain step at rate 1 over "
    "the weight, in norm. noise: share of the gradient that differs from batch to batch. condition: of the "
    "inputs' covariance, + at least. rank: directions that carry its variance / all that vary. * stands out."
)


def diagnose(
    model: str | None = None,
    *,
    data: str | None = None,
    read: str = "",
    keep_batches: int | None = None,
    workload: str | None = None,
    batches: int = 8,
    batch_size: int | None = None,
    loss: str = "",
    step: str = "",
    seed: int = 0,
    json: Switch = False,
) -> None:
    """Examine your model's layers for a few batches and recommend a rule, with the reason and its certainty.

    Nothing is trained: the model is examined at initialisation. This takes seconds for a small model.

    For example:

        plywise diagnose my.module:make_model --data my.module:make_data
        plywise diagnose mine:model --data table.csv --batches 16 --batch-size 64
        plywise diagnose mine:model --data my.npz --loss mine:my_loss --json
        plywise diagnose mine:bert --data mine:loaders --step mine:step
        # one of ours
        plywise diagnose --workload digits-conv

    Args:
        model: function that makes your network, as module:name.
        data: module:name of a function that returns (x, y), (x, y, x_test, y_test) or three pairs, where a
            Dataset, a DataLoader or an iterable of batches may stand for a pair; a .npz file with x_train and
            y_train; a .csv or .parquet file whose last column is the target; or a folder of images.
        read: how the data are read, where plywise would guess: header=yes or no and target=NAME (a column)
            for a .csv file, targets=classes or numbers, inputs=numbers, images or tokens; put commas between.
        keep_batches: batches that are kept of a stream (a DataLoader, an iterable). Default: 1000.
        workload: instead of a model: name of a workload that plywise ships.
        batches: how many batches of the training part are examined.
        batch_size: samples a batch. Default: the workload's; 128 for your model.
        loss: function of outputs and targets, as module:name. Default: cross entropy for classes, squared
            error for numbers.
        step: function of a model and a batch of your data to the loss, as module:name, for models and batches
            of any kind.
        seed: of the weights and of which samples are looked at.
        json: print diagnosis and advice as JSON.
    """
    if batches < 1 or (batch_size is not None and batch_size < 1):
        raise CommandError(f"--batches and --batch-size are 1 at least, not {batches} and {batch_size}.")
    asked, found, subject = _resolve_subject(model, data, read, keep_batches, workload, loss, step)
    from plywise.arena.diagnostics.advice import advice
    from plywise.arena.diagnostics.diagnosis import diagnose_workload

    try:
        diagnosis = diagnose_workload(asked, found, batches=batches, batch_size=batch_size, seed=seed)
    except PlywiseError:
        raise
    except Exception as error:  # the user's own code runs in there
        raise BenchError(
            f"{asked.name} failed while it was looked at: {type(error).__name__}: {error}."
        ) from error
    recommended = advice(diagnosis, subject)
    if json:
        print_json({"diagnosis": diagnosis, "advice": recommended, "guesses": asked.guesses})
    else:
        screen = console()
        for guess in asked.guesses:
            screen.print(guess)
        _print_layers(screen, diagnosis)
        _print_advice(screen, recommended)


def _resolve_subject(
    model: str | None,
    data: str | None,
    read: str,
    keep_batches: int | None,
    workload: str | None,
    loss: str,
    step: str,
) -> tuple[Workload, Data, str]:
    """Return the workload, its data, and what `plywise bench` calls it."""
    from plywise.arena.workloads import find_workload
    from plywise.arena.workloads.own import own_workload

    if (model is None) == (workload is None):
        raise CommandError(
            "Say what to look at: your model as module:name with --data, or --workload with the name of one "
            "of ours."
        )
    if workload is not None:
        if data is not None or read or keep_batches or loss or step:
            raise CommandError(
                "--data, --read, --keep-batches, --loss and --step belong to a model of your own."
            )
        shipped = find_workload(workload)
        return shipped, shipped.make_data(), f"--workloads {shipped.name}"
    if data is None:
        raise CommandError(f"Say with --data where the data for {model} are.")
    how: dict[str, Any] = {"read": read, "keep_batches": keep_batches, "loss": loss, "step": step}
    own = own_workload(str(model), str(model), data, **how, blocks=0)
    words = [str(model), "--data", data]
    for name, value in how.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    return own, own.make_data(), shlex.join(words)


def _print_layers(screen: Console, diagnosis: Diagnosis) -> None:
    loss = "" if diagnosis.loss is None else f", loss {diagnosis.loss:.4g}"
    title = (
        f"{diagnosis.model}: {diagnosis.parameters:,} parameters, {diagnosis.batches} batches of up to "
        f"{diagnosis.batch_size}{loss}"
    )
    if diagnosis.layers:
        screen.print(_table(title, diagnosis))
        screen.print(LEGEND, style="dim")
    else:
        screen.print(title, style="bold")
    if diagnosis.left:
        screen.print(f"No rule handles: {_format_left(diagnosis)}.", style="dim")
    spans = [
        f"{what} {value:.3g}"
        for what, value in (
            ("backward values, last layer over first:", diagnosis.backward_ratio),
            ("effective rates, largest over smallest:", diagnosis.rate_spread),
        )
        if value is not None
    ]
    if spans:
        screen.print(f"\n{'; '.join(spans).capitalize()}.")


def _table(title: str, diagnosis: Diagnosis) -> Table:
    shown = table("layer", "type", "in→out", *NUMBERS, title=title, numbers=NUMBERS)
    for layer in diagnosis.layers:
        shown.add_row(
            layer.name or "(model)",
            layer.type,
            f"{layer.inputs}→{layer.outputs}",
            f"{layer.parameters:,}",
            *_cells(layer, diagnosis),
        )
    return shown


def _cells(layer: LayerDiagnosis, diagnosis: Diagnosis) -> list[Text | str]:
    """Return the numbers of a layer; what stands out is marked."""
    from rich.text import Text

    from plywise.arena.diagnostics.advice import outlying

    if not layer.uses:
        why = "not used" if layer.trains else "frozen"
        return [why, *["–"] * (len(NUMBERS) - 2)]
    striking, read = outlying(layer, diagnosis), layer.read
    cells = {
        "rows": format_number(layer.rows),
        "backward": _shorten(layer.backward),
        "backward_to_last": _shorten(layer.backward_to_last),
        "silent": format_number(layer.silent, ".0%"),
        "rate": _shorten(layer.rate) if layer.trains else "frozen",
        "noise": format_number(layer.noise, ".0%"),
        "condition": _shorten(read.condition if read else None) + ("+" if read and read.at_least else ""),
        "rank": f"{_shorten(read.effective_rank)}/{read.rank}" if read else "–",
    }
    return [Text(f"{cell}*", STRIKING) if name in striking else cell for name, cell in cells.items()]


def _shorten(value: float | None) -> str:
    """Two digits, and an exponent without its zeros: the table is wide."""
    text = format_number(value, ".2g")
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def _format_left(diagnosis: Diagnosis) -> str:
    groups: dict[str, list[str]] = {}
    for one in diagnosis.left:
        groups.setdefault(one.reason, []).append(one.name or one.type)
    return "; ".join(f"{_list_few(names)} ({reason})" for reason, names in groups.items())


def _list_few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _print_advice(screen: Console, recommended: list[Advice]) -> None:
    from rich.padding import Padding

    for place, one in enumerate(recommended, 1):
        screen.print(f"\n{place}. {one.title}", style="bold")
        for text in (one.reason, f"How sure: {one.sure}"):
            screen.print(Padding(text, (0, 0, 0, 3)))
        if one.check:
            screen.print(f"   Check it: {one.check}", soft_wrap=True)
