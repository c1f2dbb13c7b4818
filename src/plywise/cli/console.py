"""How commands write: colours and tables in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 200
"""Columns when nobody looks: wide enough that no table wraps on its way into a file or to grep."""


def console() -> Console:
    """Standard output."""
    from rich.console import Console

    plain = Console(highlight=False, emoji=False, markup=False)
    return (
        plain if plain.is_terminal else Console(highlight=False, emoji=False, markup=False, width=PIPE_WIDTH)
    )


def table(*headings: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in ``numbers`` are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return made


def number(value: Any, pattern: str = ".3g") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, pattern)
