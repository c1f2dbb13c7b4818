"""The scores of trials, tested on hand-made trials."""

from __future__ import annotations

import math

from fake_bench import line
from hypothesis import given
from hypothesis import strategies as st

from plywise.arena.scoring.score import (
    CLOCKS,
    choose_best,
    find_best,
    find_last,
    to_target,
)

metrics = st.lists(st.one_of(st.none(), st.floats(0, 2)), min_size=0, max_size=8)


def test_each_clock_shows_its_own_time():
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
    assert find_last(failed) == math.inf
    assert find_best(failed) == 0.4


def test_a_trial_that_fails_during_a_measurement_has_one_more_step():
    assert to_target(line(validation=[0.9, 0.4], cpu=[0.0, 1.0], failure="x"), 0.1, "cpu") == math.inf


def test_nothing_measured_is_infinitely_bad():
    nothing = line(
        steps=[], loss=[], validation=[], cpu=[], wall=[], failure="ValueError before the first step"
    )
    assert find_best(nothing) == find_last(nothing) == to_target(nothing, 1.0, "wall") == math.inf


@given(metrics, st.floats(0, 2), st.floats(0, 2))
def test_a_harder_target_never_comes_sooner(values, one, other):
    run = line(steps=list(range(len(values))), validation=values)
    assert to_target(run, min(one, other)) >= to_target(run, max(one, other))
    assert math.isfinite(to_target(run, one)) == (find_best(run) <= one)


def test_the_trial_with_the_fewest_steps_is_chosen():
    quick = line(trial=1, validation=[0.9, 0.3, 0.2])
    deep = line(trial=2, validation=[0.9, 0.4, 0.01])
    assert choose_best([deep, quick], 0.3) is quick
    assert choose_best([quick, deep], 0.001) is deep, "nobody reached it: the lowest metric"
    assert choose_best([quick, deep], None) is deep


def test_a_failed_trial_is_chosen_last_even_if_it_was_fastest():
    failed = line(trial=0, validation=[0.9, 0.01], failure="diverged")
    slow = line(trial=1, validation=[0.9, 0.8, 0.7])
    assert choose_best([failed, slow], 0.3) is slow
    assert choose_best([failed], 0.3) is failed


def test_only_tuning_trials_are_chosen_and_ties_go_to_the_first():
    assert choose_best([line(purpose="final", validation=[0.0])], 0.3) is None
    assert choose_best([], 0.3) is None
    assert choose_best([line(trial=2), line(trial=1)], 0.4)["trial"] == 1


def test_the_test_set_has_no_effect():
    one, other = line(trial=0, test=0.9), line(trial=1, test=0.0)
    assert choose_best([one, other], 0.4) is one
