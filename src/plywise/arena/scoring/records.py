"""The key of a trial's line."""

from typing import Any, NamedTuple

TrialRecord = dict[str, Any]
"""A trial, as the ledger has it."""

TUNING, FINAL = "tuning", "final"
DEFAULTS, TUNED = "defaults", "tuned"


class Key(NamedTuple):
    """Identifies a trial: a bench holds each key once."""

    workload: str
    method: str
    purpose: str  # TUNING or FINAL
    track: str  # DEFAULTS or TUNED
    trial: int  # number of the point in the search space, -1 for the defaults
    seed: int


def make_key(line: dict[str, Any]) -> Key:
    """Return the key of a line."""
    return Key(*(line[name] for name in Key._fields))
