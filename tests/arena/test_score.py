"""What a trial is worth, against hand-made trials."""

from __future__ import annotations

import math
import random

import pytest
from fake_bench import line
from hypothesis import given
from hypothesis import strategies as st

from plywise.arena.scoring.score import (
    CLOCKS,
    best_validation,
    choose_best,
    last_validation,
    loose_target_of,
    target_of,
    to_target,
)

metrics = st.lists(st.one_of(st.none(), st.floats(0, 2)), min_size=0, max_size=8)


def trials(*best: float | None, method: str = "sgd", purpose: str = "tuning"):
    return [line(method=method, purpose=purpose, trial=i, validation=[0.9, b]) for i, b in enumerate(best)]


def test_each_clock_tells_its_own_time():
    run = line(gradients=2.0)
    assert [to_target(run, 0.4, clock) for clock in CLOCKS] == [20, 40, 1.0, 1.1]
    assert [to_target(run, 0.05, clock) for clock in CLOCKS] == [math.inf] * 4
    assert to_target(run, None) == math.inf


def test_a_target_met_exactly_is_met():
    assert to_target(line(), 0.1) == 40
    assert to_target(line(), 0.9) == 0


def test_a_failure_is_a_miss_unless_the_target_came_first():
    failed = line(validation=[0.9, 0.4, None], failure="diverged at step 33")
    assert to_target(failed, 0.4) == 20
    assert to_target(failed, 0.3) == math.inf
    assert last_validation(failed) == math.inf
    assert best_validation(failed) == 0.4


def test_a_trial_that_failed_while_it_was_measured_has_a_step_too_many():
    assert to_target(line(validation=[0.9, 0.4], cpu=[0.0, 1.0], failure="x"), 0.1, "cpu") == math.inf


def test_nothing_measured_is_infinitely_bad():
    nothing = line(
        steps=[], loss=[], validation=[], cpu=[], wall=[], failure="ValueError before the first step"
    )
    assert best_validation(nothing) == last_validation(nothing) == to_target(nothing, 1.0, "wall") == math.inf


@given(metrics, st.floats(0, 2), st.floats(0, 2))
def test_a_harder_target_never_comes_sooner(values, one, other):
    run = line(steps=list(range(len(values))), validation=values)
    assert to_target(run, min(one, other)) >= to_target(run, max(one, other))
    assert math.isfinite(to_target(run, one)) == (best_validation(run) <= one)


def test_the_third_best_sets_the_target():
    lines = trials(0.5, 0.01, 0.2, 0.3, 0.4)
    assert target_of(lines, {"sgd"}) == 0.3
    lucky = trials(0.0001)
    assert target_of([*lines, *lucky], {"sgd"}) == 0.2, "one lucky run moves it by one place, not to itself"
    random.Random(0).shuffle(lines)
    assert target_of(lines, {"sgd"}) == 0.3


@pytest.mark.parametrize(("best", "target"), [((), None), ((0.5,), 0.5), ((0.5, 0.2), 0.5), ((None,), 0.9)])
def test_few_trials_set_the_worst_of_them(best, target):
    assert target_of(trials(*best), {"sgd"}) == target


def test_only_tuning_of_baselines_sets_targets():
    ours = trials(0.01, 0.01, 0.01, method="proxprop")
    finals = trials(0.02, 0.02, 0.02, purpose="final")
    assert target_of([*ours, *finals], {"sgd"}) is None
    assert target_of([*ours, *finals, *trials(0.3)], {"sgd"}) == 0.3
    assert loose_target_of([*ours, *finals, *trials(0.3)], {"sgd"}) == 0.3


@given(st.lists(st.floats(0, 2), max_size=9))
def test_the_loose_target_is_never_the_harder_one(best):
    strict, loose = target_of(trials(*best), {"sgd"}), loose_target_of(trials(*best), {"sgd"})
    assert (strict is None) == (loose is None) == (not best)
    assert not best or loose >= strict


def test_the_trial_with_the_fewest_steps_is_chosen():
    quick = line(trial=1, validation=[0.9, 0.3, 0.2])
    deep = line(trial=2, validation=[0.9, 0.4, 0.01])
    assert choose_best([deep, quick], 0.3) is quick
    assert choose_best([quick, deep], 0.001) is deep, "nobody reached it: the lowest metric"
    assert choose_best([quick, deep], None) is deep


def test_a_failed_trial_is_chosen_last_even_if_it_was_first_there():
    failed = line(trial=0, validation=[0.9, 0.01], failure="diverged")
    slow = line(trial=1, validation=[0.9, 0.8, 0.7])
    assert choose_best([failed, slow], 0.3) is slow
    assert choose_best([failed], 0.3) is failed


def test_only_tuning_trials_are_chosen_and_equals_go_to_the_first():
    assert choose_best([line(purpose="final", validation=[0.0])], 0.3) is None
    assert choose_best([], 0.3) is None
    assert choose_best([line(trial=2), line(trial=1)], 0.4)["trial"] == 1


def test_the_test_set_has_no_say():
    one, other = line(trial=0, test=0.9), line(trial=1, test=0.0)
    assert choose_best([one, other], 0.4) is one


def test_what_a_baseline_reaches_at_the_very_end_sets_no_target():
    late = [line(trial=i, steps=[0, 50, 100], validation=[0.9, 0.5, 0.4 - i / 100]) for i in range(4)]
    assert target_of(late, {"sgd"}) == loose_target_of(late, {"sgd"}) == 0.5
    failed = [line(trial=i, steps=[0, 40, 80], validation=[0.9, 0.5, 0.4 - i / 100]) for i in range(4)]
    assert target_of([*late, *failed], {"sgd"}) == pytest.approx(0.39), (
        "80 % of the whole run, not of their own"
    )
