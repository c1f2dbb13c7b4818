"""Counts and lists of names in sentences."""

NAMED = 4
"""Names that a sentence lists at most, unless it lists all: tables have the others."""


def format_count(number: int, what: str) -> str:
    """Return a number of things, as in "3 seeds".

    Example:
        >>> format_count(1, "seed"), format_count(2, "seed")
        ('1 seed', '2 seeds')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def join(names: list[str]) -> str:
    """Return the first of some names with commas and an "and", and how many others there are.

    Example:
        >>> join(["a", "b"]), join(["a", "b", "c", "d", "e", "f"])
        ('a and b', 'a, b, c, d and 2 more')
    """
    if len(names) > NAMED + 1:
        names = [*names[:NAMED], f"{len(names) - NAMED} more"]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
