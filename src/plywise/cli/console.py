"""Output of commands: colours and tables in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plywise._util.plain_json import drop_infinite, map_floats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PACKAGE = Path(__file__).parents[1]

PIPE_WIDTH = 200
"""Columns where the output is not a terminal: wide enough that no table wraps in a file or under grep."""


@dataclass
class Volume:
    """How much commands print in addition to their results.

    Attributes:
        quiet: nothing.
        verbose: a line for each piece of work in terminals, too, and where errors come from.
    """

    quiet: bool = False
    verbose: bool = False


VOLUME = Volume()
"""What ``--quiet`` and ``--verbose`` have set for the command that runs."""


def console() -> Console:
    """Standard output, for results."""
    return _console()


def notes(apart: bool = False) -> Console:
    """For output beside results: plans, progress, notes. Nothing is shown with ``--quiet``.

    Args:
        apart: print on standard error, since a program reads standard output.
    """
    return _console(stderr=apart, quiet=VOLUME.quiet)


def _console(**how: Any) -> Console:
    from plywise._util.screen import Screen

    plain: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False, **how}
    screen = Screen(**plain)
    return screen if screen.is_terminal else Screen(width=PIPE_WIDTH, **plain)


def take_any_encoding() -> None:
    """Let characters that the encoding of an output lacks be printed as question marks.

    Python raises an error instead, for example where Windows writes the output into a file.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not _is_unicode(stream.encoding):
            stream.reconfigure(errors="replace")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print our own warnings in one line, without the place in our code: they are about the user's files."""
    before = warnings.formatwarning

    def format_plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(_PACKAGE):
            return f"plywise: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = format_plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def print_json(value: Any) -> None:
    """Print a value as JSON: dataclasses as objects, what is not finite as null."""
    plain, is_ascii = map_floats(value, drop_infinite), not _is_unicode(getattr(sys.stdout, "encoding", None))
    print(json.dumps(plain, ensure_ascii=is_ascii, indent=1, allow_nan=False, default=_convert))


def _is_unicode(encoding: str | None) -> bool:
    return encoding is None or encoding.lower().startswith("utf")


def _convert(value: Any) -> Any:
    """Return a value that JSON does not know as one that it knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return map_floats(asdict(value), drop_infinite)
    return list(value) if isinstance(value, set | frozenset) else str(value)


def table(*headings: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns named in ``numbers`` are aligned to the right."""
    from rich.box import SIMPLE_HEAD

    from plywise.cli.wide_table import WideTable

    made = WideTable(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return made
