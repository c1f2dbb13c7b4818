"""Rankings from ledgers with a known winner."""

from __future__ import annotations

import copy
import csv
import io
import math
import random

import pytest
from fake_bench import line, make_bench, make_lines

from plywise.arena.reports.bench_charts import find_best_after_trials, find_front, make_curves, thin
from plywise.arena.reports.spreadsheets import format_ranking_csv, format_runs_csv
from plywise.arena.scoring.ranking import (
    compare_methods,
    find_null_ratio,
    measure_area,
    measure_noise,
    rank_methods,
)
from plywise.arena.scoring.results import gather_results
from plywise.arena.scoring.score import CLOCKS

FOUR = ["sgd", "sgd-again", "proxprop", "local"]


def make_final_runs(method: str, times: list[float], workload: str = "digits", **other):
    """Make runs that reach 0.1 after these steps of 0.1 seconds each, or never if infinite."""
    return [
        line(
            workload,
            method,
            "final",
            "tuned",
            0,
            seed,
            steps=[0, 400 if math.isinf(when) else when, 400],
            validation=[0.9, 0.5 if math.isinf(when) else 0.1, 0.4 if math.isinf(when) else 0.05],
            cpu=[0.0, 40.0 if math.isinf(when) else 0.1 * when, 40.0],
            wall=[0.0, 40.0 if math.isinf(when) else 0.1 * when, 40.0],
            **other,
        )
        for seed, when in enumerate(times)
    ]


def gather_small_bench(lines, methods=("sgd", "sgd-again", "proxprop"), workloads=("digits",), grid=0):
    """Gather the results of a bench whose times are exact, unless ``grid`` is given."""
    bench = make_bench(methods, workloads)
    for one in bench["workloads"].values():
        one.update(target=0.1, measure_every=grid)
    bench["refused"] = []
    return gather_results(bench, lines)


def gather_whole_bench():
    bench = make_bench()
    return gather_results(bench, make_lines(bench))


def index_by_method(found):
    return {one.method: one for one in found}


def test_a_rank_by_hand():
    field = gather_small_bench(
        [*make_final_runs("sgd", [100, 200, 300]), *make_final_runs("proxprop", [100, 100, 100])]
    )
    best, peer = rank_methods(field, "tuned", "steps")
    assert (best.method, best.rank.value, best.area[:3]) == ("proxprop", 1, (1, 1, 1))
    assert best.ratio[:3] == (1 / 3, 0.5, 1.0)
    assert (peer.method, peer.rank.value, peer.profile) == ("sgd", 2, {"digits": 2.0})
    assert peer.area.value == pytest.approx(2 / 3)
    assert peer.rank.low == 1, "in some resamples they are level"
    assert (peer.reached, peer.runs, peer.compared) == (3, 3, 1)


def test_every_clock_has_its_own_ranking():
    quick = make_final_runs("proxprop", [100, 100, 100], gradients=4.0)
    for run in quick:
        run["cpu"] = [10 * value for value in run["cpu"]]
    field = gather_small_bench([*make_final_runs("sgd", [200, 200, 200]), *quick])
    first = {
        clock: rank_methods(field, "tuned", clock)[0].method
        for clock in ("steps", "gradients", "cpu", "wall")
    }
    assert first == {"steps": "proxprop", "gradients": "sgd", "cpu": "sgd", "wall": "proxprop"}


def test_misses_are_infinite_in_medians_and_bounds_in_ratios():
    field = gather_small_bench(
        [*make_final_runs("sgd", [100, 100, 100]), *make_final_runs("proxprop", [50, math.inf, math.inf])]
    )
    row = index_by_method(compare_methods(field))["proxprop"]
    assert (row.reached, row.runs, row.times["steps"].value) == (1, 3, math.inf)
    assert (row.ratios["steps"].value, row.ratios["steps"].high, row.ratios["steps"].mark) == (
        4.0,
        math.inf,
        "≥",
    )
    assert row.ratios["steps"].low == 0.5, "in some resamples two of three seeds are the one that was quick"
    place = index_by_method(rank_methods(field, "tuned", "steps"))["proxprop"]
    assert (place.area.value, place.profile["digits"]) == (0.0, math.inf)


def test_a_crash_before_the_first_step_is_a_miss_with_the_pace_of_other_runs():
    nothing = {"steps": [], "loss": [], "validation": [], "cpu": [], "wall": []}
    crashed = [line("digits", "proxprop", "final", seed=s, failure="OSError", **nothing) for s in range(3)]
    field = gather_small_bench([*make_final_runs("sgd", [100, 100, 100]), *crashed])
    row = index_by_method(compare_methods(field))["proxprop"]
    assert (row.failed, row.reached, row.step_cost, row.seconds) == (3, 0, None, None)
    assert row.validation.median == math.inf
    assert row.ratios["cpu"].value == pytest.approx(4.0)
    assert row.ratios["cpu"].mark == "≥"


def test_a_workload_that_does_not_fit_counts_as_a_miss_and_one_not_yet_run_does_not():
    bench = make_bench(["sgd", "local"], ["digits", "words"])
    lines = [one for one in make_lines(bench) if one["method"] == "sgd" or one["workload"] == "digits"]
    refused = index_by_method(rank_methods(gather_results(bench, lines), "tuned", "steps"))["local"]
    assert refused.profile["words"] == math.inf
    pending = index_by_method(
        rank_methods(gather_results({**bench, "refused": []}, lines), "tuned", "steps")
    )["local"]
    assert list(pending.profile) == ["digits"]


def test_the_peer_is_the_best_tuned_baseline():
    field = gather_whole_bench()
    assert field.peer("digits", "steps").runs[0]["method"] == "adamw"
    assert field.peer("digits", "steps").runs[0]["track"] == "tuned"
    for row in compare_methods(field):
        if (row.method, row.track) == ("adamw", "tuned"):
            assert row.ratios["steps"][:3] == (1, 1, 1), "against itself, seed by seed"
    only = gather_results(field.bench, [one for one in make_lines(field.bench) if one["track"] == "defaults"])
    assert only.peer("words", "steps").runs[0]["track"] == "defaults"


def test_a_null_control_takes_no_rank_and_sets_no_time():
    field = gather_small_bench(
        [
            *make_final_runs("sgd", [100] * 3),
            *make_final_runs("sgd-again", [50] * 3),
            *make_final_runs("proxprop", [80] * 3),
        ]
    )
    found = index_by_method(rank_methods(field, "tuned", "steps"))
    assert found["sgd-again"].rank is None
    assert (found["proxprop"].rank.value, found["proxprop"].profile["digits"]) == (1, 1.0)
    assert find_null_ratio(field, "tuned", "steps", "sgd-again").value == 0.5
    assert measure_noise(field, "tuned", "steps") == 2.0


def test_noise_is_unknown_where_the_control_missed_and_none_without_one():
    missed = gather_small_bench(
        [*make_final_runs("sgd", [100, 100, math.inf]), *make_final_runs("sgd-again", [100] * 3)]
    )
    assert measure_noise(missed, "tuned", "steps") == math.inf
    alone = gather_small_bench(make_final_runs("sgd", [100] * 3), methods=("sgd",))
    assert measure_noise(alone, "tuned", "steps") == 1.0


def test_a_null_control_without_its_original_is_no_reference():
    runs = [*make_final_runs("adamw", [100] * 3), *make_final_runs("sgd-again", [100] * 3)]
    field = gather_small_bench(runs, methods=("adamw", "sgd-again"))
    assert field.reference == "adamw"
    assert {row.method: row.step_cost for row in compare_methods(field)} == {"adamw": 1, "sgd-again": 1}
    assert gather_small_bench(make_final_runs("sgd-again", [100]), methods=("sgd-again",)).reference is None


def test_intervals_include_the_time_between_two_measurements():
    """All seeds agree on a point of the grid, but the true times between two points are unknown."""
    runs = [
        *make_final_runs("sgd", [200] * 3),
        *make_final_runs("sgd-again", [200] * 3),
        *make_final_runs("proxprop", [180] * 3),
    ]
    for clock in CLOCKS:
        exact = index_by_method(compare_methods(gather_small_bench(runs)))["proxprop"].ratios[clock]
        assert exact[:3] == pytest.approx((0.9, 0.9, 0.9))
        row = index_by_method(compare_methods(gather_small_bench(runs, grid=20)))["proxprop"]
        assert row.ratios[clock][:3] == pytest.approx((160 / 200, 0.9, 180 / 180))
        assert measure_noise(gather_small_bench(runs, grid=20), "tuned", clock) == pytest.approx(200 / 180)
    itself = index_by_method(compare_methods(gather_small_bench(runs, grid=20)))["sgd"].ratios["steps"]
    assert itself[:3] == (1, 1, 1)
    far = measure_noise(gather_small_bench(runs, grid=200), "tuned", "steps")
    assert far == math.inf, "there from the first measurement on"


def test_a_method_with_nothing_to_tune_is_in_both_tracks():
    bench = make_bench(["sgd", "proxprop"], ["digits"])
    bench["methods"]["proxprop"]["space"] = {}
    lines = [one for one in make_lines(bench) if one["method"] == "sgd" or one["trial"] == -1]
    field = gather_results(bench, lines)
    for track in ("tuned", "defaults"):
        assert index_by_method(rank_methods(field, track, "steps"))["proxprop"].runs == 3
    assert len(list(csv.DictReader(format_runs_csv(field)))) == len(lines), "a row for each run"


def test_ties_share_a_rank():
    field = gather_small_bench([*make_final_runs("sgd", [100] * 3), *make_final_runs("proxprop", [100] * 3)])
    assert [place.rank[:3] for place in rank_methods(field, "tuned", "steps")] == [(1, 1, 2), (1, 1, 2)]


def test_ties_without_the_target_are_ordered_by_their_final_value():
    """All have no area. A cheap step must not help: it only makes the bound on the time of a miss smaller."""
    never = [math.inf] * 3
    ends = {"adamw": 0.3, "nlms": 0.2, "bad": 0.6}
    lines = [*make_final_runs("sgd", [100] * 3), *make_final_runs("proxprop", [100, math.inf, math.inf])]
    for name, end in ends.items():
        runs = make_final_runs(name, never)
        for run in runs:
            run["validation"][-1] = end
            run["cpu"] = [0.0, 0.1, 0.1] if name == "bad" else run["cpu"]
        lines += runs
    field = gather_small_bench(lines, methods=("bad", "adamw", "nlms", "proxprop", "sgd"))
    for clock in CLOCKS:
        found = rank_methods(field, "tuned", clock)
        assert [one.method for one in found] == ["sgd", "proxprop", "nlms", "adamw", "bad"]
        assert [one.rank.value for one in found] == [1, 2, 2, 2, 2]
        assert [one.level for one in found] == [False, True, True, True, True]
    assert [one.end for one in found[2:]] == [2, 3, 5]


def test_a_method_that_does_not_fit_ranks_last():
    bench = make_bench(["sgd", "local"], ["digits", "words"])
    found = index_by_method(rank_methods(gather_results(bench, make_lines(bench)), "tuned", "steps"))
    assert bench["refused"][0]["workload"] == "words"
    assert found["local"].end == 2
    assert found["sgd"].end == 1


def test_the_area_is_that_under_the_profile():
    """Against the profile summed up on a fine grid."""
    for place in rank_methods(gather_whole_bench(), "tuned", "cpu"):
        grid = [1 + 3 * (i + 0.5) / 20_000 for i in range(20_000)]
        shares = [sum(r <= tau for r in place.profile.values()) / len(place.profile) for tau in grid]
        assert place.area.value == pytest.approx(sum(shares) / len(grid), abs=1e-3)
        assert place.area.value == pytest.approx(
            sum(map(measure_area, place.profile.values())) / len(place.profile)
        )


def test_the_order_of_lines_does_not_matter():
    bench = make_bench()
    lines = make_lines(bench)
    one = rank_methods(gather_results(bench, lines), "tuned", "cpu")
    random.Random(0).shuffle(lines)
    assert rank_methods(gather_results(bench, lines), "tuned", "cpu") == one


def test_slower_seeds_never_improve_a_place():
    bench = make_bench()
    lines = make_lines(bench)
    slowed = copy.deepcopy(lines)
    for one in slowed:
        if one["method"] == "proxprop" and one["purpose"] == "final":
            one["cpu"] = [2 * value for value in one["cpu"]]
    before = index_by_method(rank_methods(gather_results(bench, lines), "tuned", "cpu"))
    after = index_by_method(rank_methods(gather_results(bench, slowed), "tuned", "cpu"))
    assert after["proxprop"].area.value < before["proxprop"].area.value
    assert after["proxprop"].ratio.value == pytest.approx(2 * before["proxprop"].ratio.value)
    assert all(after[name].area.value >= before[name].area.value for name in after if name != "proxprop")


def test_step_cost_memory_and_test_metric():
    found = {(row.workload, row.method, row.track): row for row in compare_methods(gather_whole_bench())}
    row = found["digits", "proxprop", "tuned"]
    assert row.step_cost == pytest.approx(1.3, rel=0.02)
    assert row.peak_mib == 20 + len("proxprop")
    assert row.test.least <= row.test.median <= row.test.greatest
    failed = found["digits", "nlms", "tuned"]
    assert (failed.failed, failed.test.greatest) == (1, math.inf)
    assert found["digits", "proxprop", "defaults"].test is not None


def test_memory_is_that_of_the_final_runs():
    trials = [line(peak_mib=900.0, trial=trial) for trial in range(5)]
    runs = make_final_runs("sgd", [100] * 3)
    for run, peak in zip(runs, (40.0, 60.0, None), strict=True):
        run["peak_mib"] = peak
    assert index_by_method(compare_methods(gather_small_bench([*trials, *runs])))["sgd"].peak_mib == 50
    for run in runs:
        run["peak_mib"] = None
    assert index_by_method(compare_methods(gather_small_bench([*trials, *runs])))["sgd"].peak_mib is None


def test_memory_is_unknown_where_no_step_was_measured():
    runs = make_final_runs("sgd", [100] * 3, peak_mib=40.0)
    early = {name: [0.0] for name in ("steps", "cpu", "wall")} | {"loss": [2.3], "validation": [0.9]}
    failed = [
        line("digits", "proxprop", "final", seed=s, failure="nan", peak_mib=9.0, **early) for s in range(3)
    ]
    field = gather_small_bench([*runs, *failed])
    assert {row.method: row.peak_mib for row in compare_methods(field)} == {"sgd": 40, "proxprop": None}
    peaks = {one["method"]: one["peak_mib"] for one in csv.DictReader(format_runs_csv(field))}
    assert peaks == {"sgd": "40.0", "proxprop": ""}
    (one,) = compare_methods(gather_small_bench([*runs[:2], {**failed[0], "method": "sgd"}]))
    assert one.peak_mib == 40, "of those that trained"


def test_tables_come_back_as_they_were():
    field = gather_whole_bench()
    found = compare_methods(field)
    table = list(csv.DictReader(io.StringIO(format_ranking_csv(found))))
    assert len(table) == len(found)
    for text, row in zip(table, found, strict=True):
        assert (text["workload"], text["method"], int(text["reached"])) == (
            row.workload,
            row.method,
            row.reached,
        )
        assert float(text["cpu_median"]) == row.times["cpu"].value
    trials = list(csv.DictReader(format_runs_csv(field)))
    assert len(trials) == len(make_lines(field.bench))
    assert {one["failure"] for one in trials if one["method"] == "sgd"} == {""}


def test_an_empty_bench():
    for bench in (make_bench(), make_bench([], [])):
        field = gather_results(bench, [])
        assert compare_methods(field) == rank_methods(field, "tuned", "cpu") == []
        assert field.peer("digits", "cpu") is None


@pytest.mark.parametrize("values", [[3, 1, 2, 5], [1, math.inf, math.inf], [2]])
def test_cost_of_tuning_against_all_orders(values):
    """Against every order that the trials could have come in."""
    from itertools import permutations

    for k, (low, middle, high) in enumerate(find_best_after_trials(values), 1):
        every = sorted(min(order[:k]) for order in permutations(values))
        for found, share in ((low, 0.25), (middle, 0.5), (high, 0.75)):
            assert found == every[math.ceil(share * len(every)) - 1]


def test_curves_keep_where_runs_end_and_what_failed():
    lines = make_final_runs("sgd", [100, 150, 200])
    lines[1].update(
        steps=[0, 7], validation=[0.9, 0.8], cpu=[0, 1], wall=[0, 1], loss=[2.0, None], failure="nan"
    )
    (curve,) = make_curves(gather_small_bench(lines), "tuned", "digits")
    assert curve["failed"] == [(curve["steps"].index(7), "seed 1: nan")]
    assert curve["validation"][0][curve["steps"].index(7)] == 0.8
    assert curve["loss"][0][curve["steps"].index(7)] is None


def test_a_median_curve_does_not_recover_because_a_run_failed():
    def field(*failed):
        lines = make_final_runs("sgd", [100, 100, 100])
        for one, value in zip(lines, (0.2, 0.3, 0.4), strict=True):
            one["loss"] = one["validation"] = [0.9, 0.5, value]
        for place in failed:
            short = {name: lines[place][name][:2] for name in ("loss", "validation", "cpu", "wall")}
            lines[place].update(steps=[0, 100], failure="nan", **short)
        (curve,) = make_curves(gather_small_bench(lines), "tuned", "digits")
        return curve

    for name in ("loss", "validation"):
        assert [line[-1] for line in field()[name]] == [0.3, 0.2, 0.4]
        assert [line[-1] for line in field(2)[name]] == [0.3, 0.2, None], "the worst, and no number"
        assert [line[-1] for line in field(0)[name]] == [0.4, 0.3, None], "the better one failed"
        assert [line[-1] for line in field(1, 2)[name]] == [None, 0.2, None]
        assert [line[1] for line in field(1, 2)[name]] == [0.5, 0.5, 0.5], "measured before they failed"
    assert field(1, 2)["cpu"][-1] == 40, "time goes on for the run that is left"


def test_long_curves_are_thinned_but_keep_their_end():
    steps = list(range(0, 5001, 5))
    same = {"steps": steps, "validation": [0.5] * 1001, "loss": [1.0] * 1001, "cpu": steps, "wall": steps}
    (curve,) = make_curves(gather_small_bench([line("digits", "sgd", "final", **same)]), "tuned", "digits")
    assert len(curve["steps"]) <= 62
    assert (curve["steps"][0], curve["steps"][-1]) == (0, 5000)


def test_the_front_has_the_methods_that_no_other_beats():
    def run(method, seconds, peak, metric):
        return line(
            "digits", method, "final", steps=[0, 10], cpu=[0, seconds / 40], wall=[0, 1], loss=[1, 1],
            validation=[0.9, metric], peak_mib=peak, test=metric,
        )  # fmt: skip

    lines = [run("sgd", 1, 10, 0.5), run("sgd-again", 2, 10, 0.5), run("proxprop", 3, 30, 0.1)]
    assert find_front(compare_methods(gather_small_bench(lines))) == {"sgd", "proxprop"}
    lines[0]["peak_mib"] = None
    assert find_front(compare_methods(gather_small_bench(lines))) == {"sgd", "proxprop"}, (
        "what was not measured is no advantage"
    )
    lines[2].update(failure="nan", test=None)
    assert find_front(compare_methods(gather_small_bench(lines))) == {"sgd"}


def test_thinning_keeps_three_digits():
    assert thin([1 / 3, 123456.0, 1e-9 / 3, None, "0.12345", math.inf, True]) == [
        0.333, 123000, 3.33e-10, None, "0.12345", math.inf, True,
    ]  # fmt: skip
