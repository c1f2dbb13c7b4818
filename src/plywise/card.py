"""The card of a rule: what its class docstring says, section by section.

The docstring is the single source of truth. Whoever shows a rule (the command line, the
documentation, the tests) reads this card, so that nothing is said twice or goes stale.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.rule import Rule

SECTIONS = ("Idea", "Equation", "Use when", "Do not use when", "Cost", "Source", "Limits")
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}|Args|Raises|Returns|Example):\s?(.*)$")
_ARGUMENT = re.compile(r"^(\w+):\s+(.*)$")
_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")  # 2003.05164 is not the year 2003
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
TAGLINE_WIDTH = 90


@dataclass(frozen=True)
class HyperParameter:
    """One argument of a rule: its name, its default as Python writes it, and what it means."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Card:
    """A rule on one card.

    Attributes:
        name: name of the class.
        tagline: the idea in one line of at most 90 characters.
        idea: the idea.
        equation: how weights move, and what the layer below hears.
        use_when: when to use it.
        do_not_use_when: when not to.
        cost: what a step costs.
        source: the papers.
        year: year of the first paper in ``source``.
        limits: known limits.
        hyper_parameters: its arguments, in order.
    """

    name: str
    tagline: str
    idea: str
    equation: str
    use_when: str
    do_not_use_when: str
    cost: str
    source: str
    year: int
    limits: str
    hyper_parameters: tuple[HyperParameter, ...]


def card_of(rule_class: type[Rule]) -> Card:
    """Read the card of a rule off its docstring.

    Raises:
        PlywiseError: a section, the year of the source, or the meaning of an argument is missing.

    Example:
        >>> import plywise as pw
        >>> card_of(pw.NLMS).year
        1960
    """
    name = rule_class.__name__
    sections = _sections(inspect.cleandoc(rule_class.__doc__ or ""))
    missing = [section for section in SECTIONS if not sections.get(section)]
    if missing:
        raise PlywiseError(f"The docstring of {name} has no section {', '.join(map(repr, missing))}.")
    texts = {section: " ".join(sections[section]) for section in SECTIONS}
    year = _YEAR.search(_ARXIV.sub("", texts["Source"]))
    if year is None:
        raise PlywiseError(f"The docstring of {name} names no year in its section 'Source'.")
    return Card(
        name=name,
        tagline=_tagline(rule_class, texts["Idea"]),
        year=int(year.group()),
        hyper_parameters=_hyper_parameters(rule_class, sections.get("Args", [])),
        **{section.lower().replace(" ", "_"): text for section, text in texts.items()},
    )


def _sections(docstring: str) -> dict[str, list[str]]:
    """The lines of each section, without their indentation."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in docstring.splitlines():
        heading = _HEADING.match(line)
        if heading:
            lines = sections.setdefault(heading[1], [])
            line = heading[2]
        elif line and not line.startswith(" "):
            lines = []  # prose between sections belongs to none of them
        if line.strip():
            lines.append(line.strip())
    return sections


def _tagline(rule_class: type[Rule], idea: str) -> str:
    """What the first line of the rule's file says after its colon, or else how the idea begins."""
    module = inspect.getmodule(rule_class)
    first = ((module and module.__doc__) or "").strip().split("\n")[0]
    text = first.partition(": ")[2] or idea
    return textwrap.shorten(text.rstrip("."), TAGLINE_WIDTH, placeholder=" …")


def _hyper_parameters(rule_class: Any, lines: list[str]) -> tuple[HyperParameter, ...]:
    names = [field.name for field in fields(rule_class)]
    meanings: dict[str, str] = {}
    current = ""
    for line in lines:
        argument = _ARGUMENT.match(line)
        # a line of prose may begin with a word and a colon too: only the rule's own names count
        if argument and argument[1] in names and argument[1] not in meanings:
            current = argument[1]
            meanings[current] = argument[2]
        elif current:
            meanings[current] += f" {line}"
    missing = [name for name in names if name not in meanings]
    if missing:
        raise PlywiseError(
            f"The docstring of {rule_class.__name__} does not explain {', '.join(missing)} under 'Args'."
        )
    return tuple(HyperParameter(f.name, _default(f), meanings[f.name]) for f in fields(rule_class))


def _default(field: Any) -> str:
    return "required" if field.default is MISSING else repr(field.default)
