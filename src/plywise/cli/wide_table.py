"""A table that is printed in several pieces where a terminal is too narrow for it."""

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

GAP = 3
"""Spaces between two columns."""
EDGES = 2
"""Spaces before the first column and behind the last one."""


class WideTable(Table):
    """A table in which no word and no number is broken to make all columns fit side by side.

    If they do not fit, the table is printed in pieces, one below the other. Each piece has the first column,
    which names the row, and as many others as there is room for.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its pieces."""
        sizes = [_measure(console, options, column) for column in self.columns]
        room = options.max_width - EDGES
        pieces = list(_group_columns([size.minimum for size in sizes], room))
        for number, places in enumerate(pieces):
            widths = _share_room([sizes[place] for place in places], room)
            yield self._take(places, widths, has_title=number == 0)

    def _take(self, places: list[int], widths: list[int], has_title: bool) -> Table:
        piece = Table(
            box=self.box,
            title=self.title if has_title else None,
            title_justify=self.title_justify,
            title_style=self.title_style,
            pad_edge=self.pad_edge,
        )
        columns = [self.columns[place] for place in places]
        for column, width in zip(columns, widths, strict=True):
            piece.add_column(column.header, justify=column.justify, overflow=column.overflow, width=width)
        for cells in zip(*(column.cells for column in columns), strict=True):
            piece.add_row(*cells)
        return piece


def _measure(console: Console, options: ConsoleOptions, column: Column) -> Measurement:
    """Measure a column: the width of its longest word, and of its longest line."""
    sizes = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(size.minimum for size in sizes), max(size.maximum for size in sizes))


def _group_columns(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Put as many columns as fit beside the first one, again and again.

    Example:
        >>> list(_group_columns([4, 10, 10, 10], 29))
        [[0, 1], [0, 2], [0, 3]]
        >>> list(_group_columns([4, 10, 10, 10], 30))
        [[0, 1, 2], [0, 3]]
    """
    piece, used = [0], widths[0]
    for place, width in enumerate(widths[1:], 1):
        if len(piece) > 1 and used + GAP + width > room:
            yield piece
            piece, used = [0], widths[0]
        piece.append(place)
        used += GAP + width
    yield piece


def _share_room(sizes: Sequence[Measurement], room: int) -> list[int]:
    """Give each column the width of its words, and what is left to those that lack most.

    Example:
        >>> _share_room([Measurement(4, 4), Measurement(6, 9), Measurement(5, 30)], 30)
        [4, 6, 14]
    """
    widths = [size.minimum for size in sizes]
    for _ in range(room - sum(widths) - GAP * (len(sizes) - 1)):
        lacking = [size.maximum - width for size, width in zip(sizes, widths, strict=True)]
        if max(lacking) == 0:
            break
        widths[lacking.index(max(lacking))] += 1
    while sum(widths) + GAP * (len(sizes) - 1) > room and max(widths) > 1:  # one word is wider than all
        widths[widths.index(max(widths))] -= 1
    return widths
