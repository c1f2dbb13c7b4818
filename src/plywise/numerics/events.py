"""Name the fallbacks that solvers count.

Every function that may leave its usual path takes a callable ``note`` and calls it with one of these names.
The health report of a rule shows them to the user, so that a changed number is never silent.
"""

from collections.abc import Callable

Note = Callable[[str], None]
"""What a solver calls with the name of each fallback."""

FLOAT64 = "solved in float64"
EIGENVALUES = "solved by clamped eigenvalues"
IDENTITY = "fell back to backpropagation"
NON_FINITE = "non-finite value"
ROUNDING = "update lost digits to rounding"


def ignore_event(event: str) -> None:
    """Do nothing with ``event``: the default of functions whose callers do not count."""
