"""Tables as text and, for notebooks, as HTML."""

from collections.abc import Iterable, Sequence
from html import escape


def format_number(value: float | None, pattern: str = ".3g") -> str:
    """Return a number, or a dash where there is none.

    Example:
        >>> format_number(0.12345), format_number(None)
        ('0.123', '–')
    """
    return "–" if value is None else format(value, pattern)


def format_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as lines of text, columns padded to their widest cell.

    Example:
        >>> print(format_table(["layer", "n"], [["0", "12"]]))
        layer  n
        0      12
    """
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
) -> str:
    """Return a table of HTML with its title above and sentences below, all text escaped.

    Example:
        >>> make_table(["a"], [["<1>"]])
        '<div><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1&gt;</td></tr></tbody></table></div>'
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    below = "".join(f"<p>{escape(text)}</p>" for text in notes)
    return f"<div>{above}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
