"""Method cards: a page for every method, written from its docstring.

`methods_by_room` says what there is, `card_page` makes a page of one card, `write_cards` writes them all.
Whatever text fields a card has become sections, in the order of the fields, so that a card may grow.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from plywise.arena.methods.listing import find_place
from plywise.registry.card import Card, read_card
from plywise.registry.find import ROOMS, TITLES, find

Rooms = Mapping[str, Sequence[Card]]
"""Cards by the room that their methods are in."""

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_MARKS = re.compile(r"([\\*_\[\]<>|#~$])")
_ELSEWHERE = ("name", "tagline", "example")
_PAPER = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
_REPOSITORY = re.compile(r"\b\w[\w-]*/(?:[\w.-]|\\_)*[\w-]")


def methods_by_room() -> Rooms:
    """The card of every method in the catalogue."""
    return {room: [read_card(find(name)) for name in names] for room, names in ROOMS.items() if names}


def prose(text: str) -> str:
    """Plain text as Markdown: what is in backquotes is code, no other sign has a meaning."""
    return "".join(
        part if number % 2 else _MARKS.sub(r"\\\1", part) for number, part in enumerate(_CODE.split(text))
    )


def sentence(text: str) -> str:
    """The same text with a capital, if it begins with a word (and not with a formula)."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]{2,}\b", text) else text


def link(markdown: str, field: str) -> str:
    """The same with links: to papers on arXiv, and in the field of code to repositories on GitHub."""
    if field == "code":
        address = "https://github.com/"
        return _REPOSITORY.sub(lambda it: f"[{it[0]}]({address}{it[0].replace(chr(92), '')})", markdown)
    return _PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\1)", markdown)


def cell(text: str) -> str:
    """Plain text as a cell of a Markdown table, where even code must not hold a bare pipe."""
    return prose(text).replace("\\|", "|").replace("|", "\\|")


def card_page(card: Card, room: str) -> str:
    """The page of a method."""
    parts = [f"# {card.name}", f"*{prose(card.tagline)}*", f"`plywise methods info {card.name}` · {room}"]
    for field in fields(card):
        value = getattr(card, field.name)
        if field.name not in _ELSEWHERE and isinstance(value, str) and value:
            heading = field.name.replace("_", " ").capitalize()
            parts.append(f"## {heading}\n\n{sentence(link(prose(value), field.name))}")
    if card.hyper_parameters:
        parts.append(f"## Hyper-parameters\n\n{_table(card.hyper_parameters)}")
    parts.append(f"## In the arena\n\n{_in_the_arena(card.name)}")
    parts.append(f"## Example\n\n```pycon\n{card.example}\n```")
    return "\n\n".join(parts) + "\n"


def _in_the_arena(name: str) -> str:
    what, colon, command = find_place(name).partition(": plywise ")
    return f"{prose(what)}:\n\n```console\n$ plywise {command}\n```" if colon else prose(what)


def _table(parameters: Sequence[Any]) -> str:
    names = [field.name for field in fields(parameters[0])]
    rows = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    for one in parameters:
        rows.append([f"`{one.name}`", f"`{one.default}`", *(cell(getattr(one, name)) for name in names[2:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def overview(rooms: Rooms) -> str:
    """The page that lists all of them."""
    parts = ["# Methods"]
    parts.append(
        "A card for each method: idea, equation, when to use it and when not, cost, hyper-parameters, "
        "source, results, limits. Each is written from the docstring, as `plywise methods info NAME` is. "
        "*Faithful*: as its paper says; *variant*: with differences that the card names; *after*: the "
        "paper's formula is not public, and the card says what was chosen."
    )
    for room, cards in rooms.items():
        rows = ["| method | in one line | year | status |", "|---|---|---|---|"]
        for card in cards:
            link = f"[{card.name}]({room}/{card.name}.md)"
            rows.append(f"| {link} | {cell(card.tagline)} | {card.year} | {card.status_word} |")
        table = "\n".join(rows)
        pages = "\n".join(f"{room}/{card.name}" for card in cards)
        parts.append(f"## {TITLES[room]}\n\n{table}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```")
    return "\n\n".join(parts) + "\n"


def write_cards(folder: Path, rooms: Rooms, write: Callable[[Path, str], None]) -> None:
    """A page for each method in a folder for each room, and the page that lists them; no others stay."""
    pages = {folder / "index.md": overview(rooms)}
    for room, cards in rooms.items():
        pages |= {folder / room / f"{card.name}.md": card_page(card, room) for card in cards}
    for old in set(folder.rglob("*.md")) - pages.keys():
        old.unlink()
    for path, text in pages.items():
        write(path, text)
