"""Targets: a quantile of the baselines' trials, soft if there are few, and no ranking close to chance."""

from __future__ import annotations

import random

import pytest
from fake_bench import line, make_bench, make_lines, write_bench
from hypothesis import given
from hypothesis import strategies as st
from test_standing import gather_small_bench, index_by_method, make_final_runs

from plywise.arena.reports.bench_page import write_page
from plywise.arena.scoring.conclusions import draw_conclusions
from plywise.arena.scoring.ranking import compare_methods, rank_methods
from plywise.arena.scoring.results import gather_results
from plywise.arena.scoring.targets import (
    ENOUGH,
    SHARE,
    STRICT_PLACE,
    Target,
    choose_loose_target,
    choose_target,
    make_target,
)


def make_trials(*best: float | None, method: str = "sgd", purpose: str = "tuning"):
    return [line(method=method, purpose=purpose, trial=i, validation=[0.9, b]) for i, b in enumerate(best)]


def write_conclusions(results) -> str:
    return "\n".join(draw_conclusions(results, compare_methods(results)))


# ---- how a target is made ----------------------------------------------------------------------------


@given(st.lists(st.floats(0, 0.8), min_size=ENOUGH, max_size=60, unique=True))
def test_a_share_of_the_baselines_trials_reaches_the_target(best):
    """For any number of trials from `ENOUGH` on, at least this share reaches it, with no trial to spare."""
    target = choose_target(make_trials(*best), {"sgd"})
    there = sum(value <= target for value in best)
    assert SHARE * len(best) <= there < SHARE * len(best) + 1


def test_enough_trials_are_those_whose_share_is_the_third_best():
    values = [place / 100 for place in range(ENOUGH)]
    random.Random(0).shuffle(values)
    assert choose_target(make_trials(*values), {"sgd"}) == sorted(values)[STRICT_PLACE - 1]


def test_trials_that_measured_nothing_count_as_the_worst():
    """If a third of the trials crash before the first step, the share still refers to all trials."""
    nothing = {"steps": [], "loss": [], "validation": [], "cpu": [], "wall": [], "failure": "OSError"}
    crashed = [line(trial=100 + i, **nothing) for i in range(20)]
    values = [place / 100 for place in range(40)]
    assert choose_target(make_trials(*values), {"sgd"}) == 0.05
    assert choose_target([*make_trials(*values), *crashed], {"sgd"}) == 0.08
    assert choose_target([*crashed, *make_trials(0.3)], {"sgd"}) == 0.3
    assert choose_target(crashed, {"sgd"}) is None


def test_the_third_best_of_few_trials_sets_the_target():
    lines = make_trials(0.5, 0.01, 0.2, 0.3, 0.4)
    assert choose_target(lines, {"sgd"}) == 0.3
    lucky = make_trials(0.0001)
    assert choose_target([*lines, *lucky], {"sgd"}) == 0.2, (
        "one lucky run moves it by one place, not to itself"
    )
    random.Random(0).shuffle(lines)
    assert choose_target(lines, {"sgd"}) == 0.3


@pytest.mark.parametrize(("best", "target"), [((), None), ((0.5,), 0.5), ((0.5, 0.2), 0.5), ((None,), 0.9)])
def test_few_trials_set_the_worst_of_them(best, target):
    assert choose_target(make_trials(*best), {"sgd"}) == target


def test_only_tuning_of_baselines_sets_targets():
    ours = make_trials(0.01, 0.01, 0.01, method="proxprop")
    finals = make_trials(0.02, 0.02, 0.02, purpose="final")
    assert choose_target([*ours, *finals], {"sgd"}) is None
    assert choose_target([*ours, *finals, *make_trials(0.3)], {"sgd"}) == 0.3
    assert choose_loose_target([*ours, *finals, *make_trials(0.3)], {"sgd"}) == 0.3


@given(st.lists(st.floats(0, 2), max_size=9))
def test_the_easy_target_is_never_harder(best):
    strict, loose = (
        choose_target(make_trials(*best), {"sgd"}),
        choose_loose_target(make_trials(*best), {"sgd"}),
    )
    assert (strict is None) == (loose is None) == (not best)
    assert not best or loose >= strict


def test_a_value_reached_only_at_the_end_sets_no_target():
    late = [line(trial=i, steps=[0, 50, 100], validation=[0.9, 0.5, 0.4 - i / 100]) for i in range(4)]
    assert choose_target(late, {"sgd"}) == choose_loose_target(late, {"sgd"}) == 0.5
    failed = [line(trial=i, steps=[0, 40, 80], validation=[0.9, 0.5, 0.4 - i / 100]) for i in range(4)]
    assert choose_target([*late, *failed], {"sgd"}) == pytest.approx(0.39), (
        "80 % of the whole run, not of their own"
    )


# ---- how soft it is ----------------------------------------------------------------------------------


def make_small_bench(stored=None, chance=0.9, sgd=(0.5,) * 30, **other):
    """Make a bench of SGD and ProxProp on one workload: SGD's tuning trials end at these values."""
    bench = make_bench(["sgd", "proxprop"], ["digits"], **other)
    bench["workloads"]["digits"] |= {"target": stored, "chance": chance}
    lines = [*make_trials(*sgd), *make_trials(0.05, method="proxprop")]
    lines = [one | {"workload": "digits"} for one in lines]
    return bench, [*lines, *make_final_runs("sgd", [200] * 3), *make_final_runs("proxprop", [100] * 3)]


def choose_target_in(*args, **more) -> Target:
    bench, lines = make_small_bench(*args, **more)
    return make_target(bench, "digits", lines)


def test_a_target_of_enough_trials_that_few_reach_is_not_soft():
    values = [0.1 + place / 100 for place in range(ENOUGH)]
    assert choose_target_in(sgd=values).softness == []
    assert choose_target_in(sgd=values[:-1]).softness == [f"the 3rd best of {ENOUGH - 1} trials"]
    assert choose_target_in(0.3, sgd=[0.5, 0.4]).softness == [], (
        "a stored target does not depend on these trials"
    )


@pytest.mark.parametrize(("count", "words"), [(1, "best of 1"), (2, "2nd best of 2"), (4, "3rd best of 4")])
def test_a_target_of_few_trials_says_which_place_it_is(count, words):
    made = choose_target_in(sgd=[0.1 * (1 + place) for place in range(count)])
    assert made.softness[0] == f"the {words} trials"


def test_a_target_that_chance_or_most_trials_reach_is_soft():
    assert choose_target_in(0.6, sgd=(0.5,) * 15 + (0.7,) * 15).softness == []
    assert choose_target_in(0.6, sgd=(0.5,) * 16 + (0.7,) * 14).softness == ["reached by 16 of 30 trials"]
    assert choose_target_in(0.6, chance=0.5).softness == ["reached by knowing nothing"]
    untrained = choose_target_in(0.95, chance=None)
    assert untrained.naive == 0.9, "where chance is unknown, an untrained network stands for it"
    assert untrained.softness == ["reached by knowing nothing"]


def test_only_soft_targets_are_named_in_the_findings():
    few = make_bench(["sgd", "adamw", "proxprop"], ["digits", "words"], trials=2)
    field = gather_results(few, make_lines(few))
    (soft,) = [one for one in write_conclusions(field).split("\n") if one.startswith("Soft targets")]
    assert f"digits {field.targets['digits'].strict:.3g} (the 3rd best of 4 trials; " in soft
    assert "words" not in soft, "its target was there before"
    enough = make_bench(["sgd", "adamw", "proxprop"], ["digits"], trials=ENOUGH // 2)
    assert "Soft targets" not in write_conclusions(gather_results(enough, make_lines(enough)))


# ---- no ranking near to chance -----------------------------------------------------------------------


@given(*(st.floats(0, 1) for _ in range(3)))
def test_methods_are_not_ranked_by_values_closer_to_zero_than_to_the_best(strict, naive, best):
    nearer = abs(strict - naive) <= abs(strict - best)
    assert Target(strict, None, True, naive=naive, best=best).ranks is not nearer


@pytest.mark.parametrize("unknown", [{"naive": None}, {"best": None}, {"strict": None}])
def test_a_workload_ranks_if_one_of_the_three_values_is_unknown(unknown):
    assert Target(
        **{"strict": 0.8, "loose": None, "stored": True, "naive": 0.9, "best": 0.1, **unknown}
    ).ranks


def two_workloads(target):
    """ProxProp is twice as fast on digits, and SGD on words, whose target is an argument."""
    lines = [
        *(
            run
            for name, when in (("sgd", 200), ("proxprop", 100))
            for run in make_final_runs(name, [when] * 3)
        ),
        *(
            run
            for name, when in (("sgd", 100), ("proxprop", 300))
            for run in make_final_runs(name, [when] * 3, "words")
        ),
    ]
    field = gather_small_bench(lines, ["sgd", "proxprop"], ["digits", "words"])
    field.bench["workloads"]["words"]["target"] = target
    return gather_results(field.bench, lines)


def test_a_workload_with_a_soft_target_does_not_affect_the_ranking():
    both, one = two_workloads(0.1), two_workloads(0.6)
    assert (both.ranked, one.ranked) == (["digits", "words"], ["digits"])
    for field, profile in ((both, {"digits": 1.0, "words": 3.0}), (one, {"digits": 1.0})):
        found = index_by_method(rank_methods(field, "tuned", "steps"))["proxprop"]
        assert found.profile == profile
        assert (found.compared, found.runs) == (len(profile), 3 * len(profile))
    rows = {(row.workload, row.method): row for row in compare_methods(one)}
    assert rows["digits", "proxprop"].ratios["steps"].value == 0.5
    assert set(rows["words", "proxprop"].ratios.values()) == {None}
    assert rows["words", "proxprop"].times["steps"].value == 300, "what was measured stays"


def test_the_findings_say_where_no_method_is_ranked_and_why(tmp_path):
    assert "Nobody is ranked" not in write_conclusions(two_workloads(0.1))
    text = write_conclusions(two_workloads(0.6))
    assert "Nobody is ranked where the target is nearer" in text
    assert "words (0.6, where knowing nothing gives 0.9 and the best run 0.05)." in text
    assert "On words" not in text
    field = two_workloads(0.6)
    lines = [run for cell in field.cells.values() for run in cell.runs]
    path, _ = write_page(write_bench(tmp_path, field.bench, lines))
    assert "words (0.6, where knowing nothing gives 0.9 and the best run 0.05)" in path.read_text("utf-8")


def test_without_a_remaining_workload_no_method_is_ranked():
    lines = [
        run for name, when in (("sgd", 200), ("proxprop", 100)) for run in make_final_runs(name, [when] * 3)
    ]
    field = gather_small_bench(lines, ["sgd", "proxprop"])
    field.bench["workloads"]["digits"]["target"] = 0.6
    field = gather_results(field.bench, lines)
    assert rank_methods(field, "tuned", "cpu") == []
    text = write_conclusions(field)
    assert "No workload is left to rank methods on." in text
    for claim in ("If CPU time", "Ahead of", "Nobody takes less", "no method reached every target"):
        assert claim not in text
