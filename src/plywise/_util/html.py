"""Tables as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
) -> str:
    """A table with its title above and sentences below, all text escaped.

    Example:
        >>> make_table(["a"], [["<1>"]])
        '<div><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1&gt;</td></tr></tbody></table></div>'
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    below = "".join(f"<p>{escape(text)}</p>" for text in notes)
    return f"<div>{above}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
