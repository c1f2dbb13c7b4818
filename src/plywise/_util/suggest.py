"""Suggests names similar to a misspelt one."""

import difflib


def suggestion(word: str, choices: tuple[str, ...], before: str = "") -> str:
    """Return ``"Did you mean …? "`` with the choices nearest to ``word``, or "" if none is near.

    Args:
        word: what was written.
        choices: what could have been meant.
        before: what stands before each choice, such as the command that takes it.
    """
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(before + lowered[match] for match in near)}? " if near else ""
