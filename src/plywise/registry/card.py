"""Reads the card of a method: the sections of its docstring.

The docstring is the only source. The command line, the documentation and the tests read this card, so that
nothing is written twice.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plywise.errors import CardError

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
"""How close a method is to its paper: as published, with named differences, or after it if its formula is not
public."""

TAGLINE_WIDTH = 90
UNSEARCHED = ("seed",)
"""Numbers that are not tuned."""

_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}|Args|Attributes|Raises|Returns|Example):\s?(.*)$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+):\s+(.*)$")
_RANGE = re.compile(r"\bRange (.+?)\.(?:\s|$)")
_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")  # the number 2003.05164 of arXiv is not the year 2003
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")


@dataclass(frozen=True)
class HyperParameter:
    """One argument of a method.

    Attributes:
        name: its name.
        default: its default as Python writes it, or "required".
        meaning: what it means, and its unit.
        range: the range to search, if it is a number.
    """

    name: str
    default: str
    meaning: str
    range: str


@dataclass(frozen=True)
class Card:
    """The card of a method.

    Attributes:
        name: name of the class or function.
        tagline: the idea in one line of at most 90 characters.
        idea: the idea.
        equation: its equations, in the names of the code.
        use_when: when to use it.
        do_not_use_when: when not to.
        layers: the layers, parameters or models on which it acts.
        cost: what a step costs.
        status: ``faithful``, ``variant`` or ``after``, and what differs from the paper.
        source: the papers.
        code: the repository of the authors' code.
        results: the paper's figures and ours.
        limits: known limits.
        year: year of the first paper in ``source``.
        example: an example that runs.
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
        return _get_status_word(self.status)


def read_card(method: Callable[..., Any]) -> Card:
    """Read the card of a class or function from its docstring.

    Raises:
        PlywiseError: a section, the example, the year of the source, or the meaning or range of an argument
            is missing; or the status is unknown.

    Example:
        >>> import plywise as pw
        >>> read_card(pw.NLMS).year
        1960
    """
    name = method.__name__
    sections = _split_sections(inspect.cleandoc(method.__doc__ or ""))
    missing = [section for section in (*SECTIONS, "Example") if not any(sections.get(section, ()))]
    if missing:
        raise CardError(f"The docstring of {name} has no section {', '.join(map(repr, missing))}.")
    texts = {section: " ".join(line.strip() for line in sections[section]).strip() for section in SECTIONS}
    year = _YEAR.search(_ARXIV.sub("", texts["Source"]))
    if year is None:
        raise CardError(f"The docstring of {name} names no year in its section 'Source'.")
    if _get_status_word(texts["Status"]) not in STATUSES:
        raise CardError(f"The Status of {name} begins with none of {', '.join(STATUSES)}.")
    return Card(
        name=name,
        tagline=_read_tagline(method, texts["Idea"]),
        year=int(year.group()),
        example=textwrap.dedent("\n".join(sections["Example"])).strip(),
        hyper_parameters=_read_hyper_parameters(method, sections.get("Args", [])),
        **{section.lower().replace(" ", "_"): text for section, text in texts.items()},
    )


def _get_status_word(status: str) -> str:
    return re.split(r"\W", status)[0]


def _split_sections(docstring: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in docstring.splitlines():
        heading = _HEADING.match(line)
        if heading:
            lines = sections.setdefault(heading[1], [])
            line = heading[2]
        elif line and not line.startswith(" "):
            lines = []  # text between sections belongs to none of them
        if line.strip():
            lines.append(line)
    return sections


def _read_tagline(method: Callable[..., Any], idea: str) -> str:
    """Read the tagline: the first line of the method's file after its colon, or the start of the idea."""
    module = inspect.getmodule(method)
    first = ((module and module.__doc__) or "").strip().split("\n")[0]
    text = first.partition(": ")[2] or idea
    return textwrap.shorten(text.rstrip("."), TAGLINE_WIDTH, placeholder=" …")


def _read_hyper_parameters(method: Callable[..., Any], lines: list[str]) -> tuple[HyperParameter, ...]:
    arguments = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    meanings: dict[str, str] = {}
    current = ""
    for line in lines:
        argument = _ARGUMENT.match(line.strip())
        # a line of text may also begin with a word and a colon: only names of arguments count
        if argument and argument[1] in {p.name for p in arguments} and argument[1] not in meanings:
            current = argument[1]
            meanings[current] = argument[2]
        elif current:
            meanings[current] += f" {line.strip()}"
    missing = [p.name for p in arguments if p.name not in meanings]
    if missing:
        raise CardError(
            f"The docstring of {method.__name__} does not explain {', '.join(missing)} under 'Args'."
        )
    return tuple(_read_hyper_parameter(method, p, meanings[p.name]) for p in arguments)


def _read_hyper_parameter(
    method: Callable[..., Any], argument: inspect.Parameter, meaning: str
) -> HyperParameter:
    found = _RANGE.search(meaning)
    default = argument.default
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and not found and argument.name not in UNSEARCHED:
        raise CardError(
            f"The docstring of {method.__name__} does not say where to look for {argument.name}: end its "
            "meaning with 'Range A to B.'"
        )
    return HyperParameter(
        argument.name, _format_default(argument), _RANGE.sub("", meaning).strip(), found[1] if found else ""
    )


def _format_default(argument: inspect.Parameter) -> str:
    if argument.default is inspect.Parameter.empty:
        return "required"
    return getattr(argument.default, "__name__", None) or repr(argument.default)
