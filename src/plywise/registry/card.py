"""The card of a method: the sections of its docstring.

The docstring is the only source. The command line, the documentation and the tests read this card, so that
nothing is written twice.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plywise.errors import PlywiseError

SECTIONS = (
    "Idea",
    "Equation",
    "Use when",
    "Do not use when",
    "Layers",
    "Cost",
    "Status",
    "Source",
    "Code",
    "Results",
    "Limits",
)
STATUSES = ("faithful", "variant", "after")
"""Fidelity to the paper: as published; with named differences; or after it, if its formula is not public."""

TAGLINE_WIDTH = 90
UNSEARCHED = ("seed",)
"""Numbers that are not tuned."""

_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}|Args|Attributes|Raises|Returns|Example):\s?(.*)$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+):\s+(.*)$")
_RANGE = re.compile(r"\bRange (.+?)\.(?:\s|$)")
_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")  # 2003.05164 is not the year 2003
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")


@dataclass(frozen=True)
class HyperParameter:
    """One argument of a method.

    Attributes:
        name: its name.
        default: its default as Python writes it, or "required".
        meaning: what it means, in what unit.
        range: where to look for it, if it is a number.
    """

    name: str
    default: str
    meaning: str
    range: str


@dataclass(frozen=True)
class Card:
    """A method on one card.

    Attributes:
        name: name of the class or function.
        tagline: the idea in one line of at most 90 characters.
        idea: the idea.
        equation: what it does, in the code's names.
        use_when: when to use it.
        do_not_use_when: when not to.
        layers: what layers, parameters or models it acts on.
        cost: what a step costs.
        status: ``faithful``, ``variant`` or ``after``, and what differs from the paper.
        source: the papers.
        code: where the authors' code is.
        results: the paper's figures and ours.
        limits: known limits.
        year: year of the first paper in ``source``.
        example: lines that run.
        hyper_parameters: its arguments, in order.
    """

    name: str
    tagline: str
    idea: str
    equation: str
    use_when: str
    do_not_use_when: str
    layers: str
    cost: str
    status: str
    source: str
    code: str
    results: str
    limits: str
    year: int
    example: str
    hyper_parameters: tuple[HyperParameter, ...]

    @property
    def status_word(self) -> str:
        """``faithful``, ``variant`` or ``after``."""
        return _status_word(self.status)


def card_of(method: Callable[..., Any]) -> Card:
    """Read the card of a class or function off its docstring.

    Raises:
        PlywiseError: a section, the example, the year of the source, or an argument's meaning or range is
            missing; the status is none that we know.

    Example:
        >>> import plywise as pw
        >>> card_of(pw.NLMS).year
        1960
    """
    name = method.__name__
    sections = _sections(inspect.cleandoc(method.__doc__ or ""))
    missing = [section for section in (*SECTIONS, "Example") if not any(sections.get(section, ()))]
    if missing:
        raise PlywiseError(
            f"The docstring of {name} has no section {', '.join(map(repr, missing))}.", see="error-card"
        )
    texts = {section: " ".join(line.strip() for line in sections[section]).strip() for section in SECTIONS}
    year = _YEAR.search(_ARXIV.sub("", texts["Source"]))
    if year is None:
        raise PlywiseError(
            f"The docstring of {name} names no year in its section 'Source'.", see="error-card"
        )
    if _status_word(texts["Status"]) not in STATUSES:
        raise PlywiseError(
            f"The Status of {name} begins with none of {', '.join(STATUSES)}.", see="error-card"
        )
    return Card(
        name=name,
        tagline=_tagline(method, texts["Idea"]),
        year=int(year.group()),
        example=textwrap.dedent("\n".join(sections["Example"])).strip(),
        hyper_parameters=_hyper_parameters(method, sections.get("Args", [])),
        **{section.lower().replace(" ", "_"): text for section, text in texts.items()},
    )


def _status_word(status: str) -> str:
    return re.split(r"\W", status)[0]


def _sections(docstring: str) -> dict[str, list[str]]:
    """The lines of each section."""
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
            lines.append(line)
    return sections


def _tagline(method: Callable[..., Any], idea: str) -> str:
    """What the first line of the method's file says after its colon, or else how the idea begins."""
    module = inspect.getmodule(method)
    first = ((module and module.__doc__) or "").strip().split("\n")[0]
    text = first.partition(": ")[2] or idea
    return textwrap.shorten(text.rstrip("."), TAGLINE_WIDTH, placeholder=" …")


def _hyper_parameters(method: Callable[..., Any], lines: list[str]) -> tuple[HyperParameter, ...]:
    arguments = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    meanings: dict[str, str] = {}
    current = ""
    for line in lines:
        argument = _ARGUMENT.match(line.strip())
        # a line of prose may begin with a word and a colon too: only the method's own names count
        if argument and argument[1] in {p.name for p in arguments} and argument[1] not in meanings:
            current = argument[1]
            meanings[current] = argument[2]
        elif current:
            meanings[current] += f" {line.strip()}"
    missing = [p.name for p in arguments if p.name not in meanings]
    if missing:
        raise PlywiseError(
            f"The docstring of {method.__name__} does not explain {', '.join(missing)} under 'Args'.",
            see="error-card",
        )
    return tuple(_hyper_parameter(method, p, meanings[p.name]) for p in arguments)


def _hyper_parameter(method: Callable[..., Any], argument: inspect.Parameter, meaning: str) -> HyperParameter:
    found = _RANGE.search(meaning)
    default = argument.default
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and not found and argument.name not in UNSEARCHED:
        raise PlywiseError(
            f"The docstring of {method.__name__} does not say where to look for {argument.name}: end its "
            "meaning with 'Range A to B.'",
            see="error-card",
        )
    return HyperParameter(
        argument.name, _default(argument), _RANGE.sub("", meaning).strip(), found[1] if found else ""
    )


def _default(argument: inspect.Parameter) -> str:
    if argument.default is inspect.Parameter.empty:
        return "required"
    return getattr(argument.default, "__name__", None) or repr(argument.default)
