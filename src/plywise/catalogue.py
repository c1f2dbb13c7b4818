"""The rules that plywise ships, by name: the one list for the command line, the demo and the tests."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import plywise
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.rule import Rule

RULES = (
    *("Backprop", "ProxProp", "BackMatching", "NLMS", "Consequentialism"),
    *("RLS", "FeatureWhitening", "AdaBK", "KFAC", "Foof", "Precondition"),
    "GradientAmplification",
)
"""Names of the rules, each an attribute of `plywise`; a name costs no import of torch."""


def find_rule(name: str) -> type[Rule]:
    """The rule called ``name``, whatever its letters' case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_rule("proxprop").__name__
        'ProxProp'
    """
    known = {rule.lower(): rule for rule in RULES}
    if name.lower() not in known:
        raise PlywiseError(
            f"No rule is called {name!r}. {suggestion(name, RULES)}`plywise methods` lists all of them."
        )
    rule: type[Rule] = getattr(plywise, known[name.lower()])
    return rule


def suggestion(word: str, choices: tuple[str, ...]) -> str:
    """``"Did you mean …? "`` for the choices nearest to ``word``, or nothing if none is near."""
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(lowered[match] for match in near)}? " if near else ""
