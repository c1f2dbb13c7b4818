"""Promises that do not hold yet: strict expected failures, so that a repair cannot go unnoticed.

Each entry is a pattern of test ids (`fnmatch`, with ``[`` and ``]`` taken literally) and the reason.
Delete the entry with the bug.
"""

KNOWN_BUGS: list[tuple[str, str]] = []
