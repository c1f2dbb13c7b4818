"""`plywise methods`: everything that plywise ships, and the card of each."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from plywise.cli.console import console, print_json, table

if TYPE_CHECKING:
    from plywise.registry.card import Card

app = App(name="methods", help="List the methods; `plywise methods info NAME` shows one in full.")


@app.default
def methods(*, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """List the methods, a line each.

    Args:
        json: print all cards as JSON.
    """
    from plywise.arena.methods import METHODS
    from plywise.registry.card import read_card
    from plywise.registry.find import ROOMS, TITLES, find

    cards = {room: [read_card(find(name)) for name in names] for room, names in ROOMS.items()}
    if json:
        print_json([{"room": room, **asdict(card)} for room, those in cards.items() for card in those])
        return
    screen = console()
    for room, those in cards.items():
        rows = table("name", "idea", "year", "status")
        rows.title, rows.title_justify = TITLES[room], "left"
        for card in those:
            rows.add_row(card.name, card.tagline, str(card.year), card.status_word)
        screen.print(rows)
    screen.print(
        f"`plywise methods info NAME` shows one in full. `plywise bench` compares: {', '.join(METHODS)}; any "
        "rule+optimizer, as in proxprop+adamw; and your own by module:name."
    )


@app.command
def info(name: str, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Show the card of a method: idea, equation, when to use it, cost, hyper-parameters, source, limits.

    Args:
        name: name of the method.
        json: print it as JSON.
    """
    from plywise.registry.card import read_card
    from plywise.registry.find import find

    card = read_card(find(name))
    if json:
        print_json(asdict(card))
    else:
        _print_card(card)


def _print_card(card: Card) -> None:
    from rich.table import Table
    from rich.text import Text

    from plywise.arena.methods.listing import find_place

    sections = {
        "idea": card.idea,
        "equation": card.equation,
        "use when": card.use_when,
        "not when": card.do_not_use_when,
        "layers": card.layers,
        "cost": card.cost,
        "settings": _settings(card),
        "status": card.status,
        "source": card.source,
        "code": card.code,
        "results": card.results,
        "limits": card.limits,
        "in the arena": find_place(card.name),
        "example": card.example,
    }
    grid = Table.grid(padding=(0, 2, 1, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(max_width=100)
    for heading, text in sections.items():
        grid.add_row(heading, Text(text.replace("``", "")))
    out = console()
    out.print(f"{card.name} ({card.year}): {card.tagline}\n", style="bold")
    out.print(grid)


def _settings(card: Card) -> str:
    lines = [
        f"{p.name} = {p.default}: {p.meaning}" + (f" Range {p.range}." if p.range else "")
        for p in card.hyper_parameters
    ]
    return "\n".join(lines) or "none"
