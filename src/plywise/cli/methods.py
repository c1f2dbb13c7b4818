"""`plywise methods`: the rules, and the card of each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from plywise.cli.console import console, table

if TYPE_CHECKING:
    from plywise.card import Card

app = App(name="methods", help="List the rules; `plywise methods info NAME` shows one in full.")


@app.default
def methods(*, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """List the rules, a line each.

    Args:
        json: print all cards as JSON.
    """
    from plywise.arena.methods import PEERS
    from plywise.card import card_of
    from plywise.catalogue import RULES, find_rule
    from plywise.local.catalogue import LEARNERS

    cards = [card_of(find_rule(name)) for name in RULES]
    if json:
        _print_json([asdict(card) for card in cards])
        return
    rows = table("rule", "idea", "year")
    for card in cards:
        rows.add_row(card.name, card.tagline, str(card.year))
    screen = console()
    screen.print(rows)
    screen.print(
        f"Local learners, for `plywise train`: {', '.join(LEARNERS)}.\n"
        f"`plywise bench` compares them all, and: {', '.join(PEERS)}; any rule+optimizer, as in "
        "proxprop+adamw; and your own by module:name.",
        soft_wrap=True,
    )


@app.command
def info(name: str, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Show the card of a rule: idea, equation, when to use it, cost, hyper-parameters, source, limits.

    Args:
        name: name of the rule.
        json: print it as JSON.
    """
    from plywise.card import card_of
    from plywise.catalogue import find_rule

    card = card_of(find_rule(name))
    if json:
        _print_json(asdict(card))
    else:
        _print_card(card)


def _print_card(card: Card) -> None:
    from rich.table import Table
    from rich.text import Text

    sections = {
        "idea": card.idea,
        "equation": card.equation,
        "use when": card.use_when,
        "not when": card.do_not_use_when,
        "cost": card.cost,
        "settings": _settings(card),
        "source": card.source,
        "limits": card.limits,
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
    lines = [f"{p.name} = {p.default}: {p.meaning}" for p in card.hyper_parameters]
    return "\n".join(lines) or "none"


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))
