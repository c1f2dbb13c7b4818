"""Finds the numbers of tuning trials; every search has the same number of trials for all methods."""

from collections.abc import Sequence
from typing import Protocol

from plywise.arena.scoring.records import TrialRecord
from plywise.arena.space import Space, draw_points
from plywise.errors import BenchError

SEARCHES = ("sobol", "optuna")
"""Names of the searches; the first is the default."""


class Search(Protocol):
    """Chooses the next numbers without a state: the same past gives the same numbers, after a resume, too."""

    def rounds(self, trials: int) -> list[range]:
        """Numbers of the trials that may run at once; a round begins when the one before has ended."""
        ...

    def numbers(self, space: Space, trial: int, past: Sequence[TrialRecord]) -> dict[str, float]:
        """Return the numbers of a trial.

        Args:
            space: what is tuned of the method.
            trial: which trial, from 0.
            past: the lines of the same method on the same workload, of all rounds before.
        """
        ...


class Sobol:
    """Quasi-random points, the same shares of the ranges for every method: equal luck; see `draw_points`.

    Example:
        >>> from plywise.arena.space import Range
        >>> Sobol().numbers({"lr": Range(0.001, 1, 0.1)}, 1, []), Sobol().rounds(8)
        ({'lr': 0.0545}, [range(0, 8)])
    """

    def rounds(self, trials: int) -> list[range]:
        """Return one round of all trials: no point depends on another."""
        return [range(trials)]

    def numbers(self, space: Space, trial: int, past: Sequence[TrialRecord]) -> dict[str, float]:
        """Return the point, which does not depend on past trials."""
        return draw_points(space, trial + 1)[trial]


def find_search(name: str) -> Search:
    """Return the search called ``name``.

    Raises:
        PlywiseError: there is none, or it needs what is not installed.
    """
    if name == "sobol":
        return Sobol()
    if name == "optuna":
        from plywise.arena.run.optuna_search import OptunaSearch

        return OptunaSearch()
    raise BenchError(f"No search is called {name!r}. There are: {', '.join(SEARCHES)}.")
