"""What the line of a trial is called by."""

from __future__ import annotations

from typing import Any, NamedTuple

TrialRecord = dict[str, Any]
"""A trial, as the ledger has it."""

TUNING, FINAL = "tuning", "final"
DEFAULTS, TUNED = "defaults", "tuned"


class Key(NamedTuple):
    """Which trial it is: a bench holds each once."""

    workload: str
    method: str
    purpose: str  # TUNING or FINAL
    track: str  # DEFAULTS or TUNED
    trial: int  # number of the point in the search space, -1 for the defaults
    seed: int


def key_of(line: dict[str, Any]) -> Key:
    """The key of a line."""
    return Key(*(line[name] for name in Key._fields))
