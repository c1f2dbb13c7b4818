"""Optuna's tree-structured Parzen estimator as a bench's search: each trial learns from those before it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plywise._util.extras import import_extra
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.score import find_best
from plywise.arena.space import Space, draw_points

DESIGN = 4
"""First trials, whose points are quasi-random and the same for every method."""

SEED = 0
"""Seed of trial 0. Each trial has its own seed: the ledger is all that has to be kept."""


class OptunaSearch:
    """Adaptive search, the lowest validation metric being the aim; failures count as failed.

    A method's result then depends on the shape of its space and on early luck. For equal chances, take
    `plywise.arena.run.search.Sobol`.

    Raises:
        PlywiseError: Optuna is not installed.
    """

    def __init__(self) -> None:
        need = "--search optuna needs Optuna: pip install 'plywise[optuna]'."
        self._optuna = import_extra("optuna", need)

    def rounds(self, trials: int) -> list[range]:
        """Return the design at once, and then one trial of every method after the other."""
        design = min(trials, DESIGN)
        return [range(design), *(range(trial, trial + 1) for trial in range(design, trials))]

    def numbers(self, space: Space, trial: int, past: Sequence[TrialRecord]) -> dict[str, float]:
        """Return the point that Optuna suggests after the trials before this one."""
        if trial < DESIGN:
            return draw_points(space, trial + 1)[trial]
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=SEED + trial, n_startup_trials=1)
        study = optuna.create_study(sampler=sampler)
        ranges = {
            name: optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)
            for name, one in space.items()
        }
        for line in sorted(past, key=lambda one: one["trial"]):
            study.add_trial(self._convert(line, ranges, space))
        suggested = study.ask(ranges).params
        rounded = {name: float(f"{suggested[name]:.3g}") for name in space}  # as points have them
        return {name: min(max(rounded[name], one.low), one.high) for name, one in space.items()}

    def _convert(self, line: TrialRecord, ranges: Mapping[str, Any], space: Space) -> Any:
        """Return a trial of the ledger as one of Optuna's."""
        trial = self._optuna.trial
        best = find_best(line)
        ended = line["failure"] is None and math.isfinite(best)
        return trial.create_trial(
            params={name: line["numbers"][name] for name in space},
            distributions=dict(ranges),
            value=best if ended else None,
            state=trial.TrialState.COMPLETE if ended else trial.TrialState.FAIL,
        )
