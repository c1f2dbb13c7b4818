"""Suggests names similar to a misspelt one."""

from __future__ import annotations

import difflib


def suggestion(word: str, choices: tuple[str, ...]) -> str:
    """Return ``"Did you mean …? "`` with the choices nearest to ``word``, or "" if none is near."""
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(lowered[match] for match in near)}? " if near else ""
