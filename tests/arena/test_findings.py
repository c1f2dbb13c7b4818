"""The conclusions from ledgers with a known winner: which sentences must occur, and which must not."""

from __future__ import annotations

import math

import pytest
from fake_bench import make_bench, make_lines
from test_standing import gather_small_bench, make_final_runs

from plywise.arena.scoring.conclusions import _list_some, draw_conclusions, format_span
from plywise.arena.scoring.intervals import Interval
from plywise.arena.scoring.ranking import compare_methods, find_lone_noise, measure_noise
from plywise.arena.scoring.results import gather_results


def write_conclusions(results) -> str:
    return "\n".join(draw_conclusions(results, compare_methods(results)))


def find_sentence(text: str, start: str) -> str:
    (found,) = [one for one in text.split("\n") if one.startswith(start)]
    return found


def test_a_clear_winner_is_named_with_its_ratio():
    bench = make_bench()
    text = write_conclusions(gather_results(bench, make_lines(bench)))
    ahead = find_sentence(text, "Ahead of the best baseline in steps")
    assert "noise: proxprop 0.4" in ahead
    assert "Behind: " in ahead
    assert (
        find_sentence(text, "If the number of steps is what counts")
        == "If the number of steps is what counts: use proxprop."
    )
    assert "On digits, less CPU time to the target than adamw: proxprop" in text


def test_a_difference_within_the_noise_is_not_claimed():
    """The method needs a tenth fewer steps, but the null control differs by a quarter."""
    quick = [*make_final_runs("sgd", [200] * 3), *make_final_runs("proxprop", [180] * 3)]
    text = write_conclusions(gather_small_bench([*quick, *make_final_runs("sgd-again", [160] * 3)]))
    assert "noise: no method" in find_sentence(text, "Ahead of the best baseline in steps")
    assert "Undecided: proxprop" in text
    assert "use proxprop" not in text
    text = write_conclusions(gather_small_bench([*quick, *make_final_runs("sgd-again", [198] * 3)]))
    assert "noise: proxprop 0.90×" in text, "a quiet control, and the same difference is reported"


def test_a_single_workload_is_judged_by_the_noise_of_single_workloads():
    """The control is off by 2 either way: over both workloads that cancels, on either of them it does not."""
    workloads = {"digits": ([100] * 3, [200] * 3), "words": ([200] * 3, [100] * 3)}

    def make_field(time):
        lines = []
        for name, (plain, again) in workloads.items():
            own = [time * when for when in plain]
            for method, times in (("sgd", plain), ("sgd-again", again), ("proxprop", own)):
                lines += make_final_runs(method, times, name)
        return gather_small_bench(lines, workloads=workloads)

    assert measure_noise(make_field(0.8), "tuned", "cpu") == pytest.approx(1)
    assert find_lone_noise(make_field(0.8), "tuned", "cpu") == 2
    text = write_conclusions(make_field(0.8))
    assert "on a single workload within 2.00× in CPU time: that is noise" in text
    assert "noise: proxprop 0.80×" in find_sentence(text, "Ahead of the best baseline in CPU time")
    assert "Nobody takes less CPU time to the target, beyond noise, than sgd on digits and words." in text
    for name in workloads:
        assert f"On {name}, less" not in text
        assert f"On {name}, less CPU time to the target than sgd: proxprop 0.45×" in write_conclusions(
            make_field(0.45)
        )


def test_a_method_is_not_distinguished_if_its_control_is_not():
    behind = {"adamw": [100] * 3, "sgd": [130] * 3}
    lines = [run for name, times in behind.items() for run in make_final_runs(name, times)]
    both = gather_small_bench(
        [*lines, *make_final_runs("sgd-again", [125] * 3)], methods=("adamw", "sgd", "sgd-again")
    )
    assert "Behind: sgd." in find_sentence(write_conclusions(both), "Ahead of the best baseline in steps")
    one = gather_small_bench(
        [*lines, *make_final_runs("sgd-again", [104] * 3)], methods=("adamw", "sgd", "sgd-again")
    )
    assert "Behind" not in find_sentence(write_conclusions(one), "Ahead of the best baseline in steps")


def test_methods_with_overlapping_seeds_are_not_distinguished():
    text = write_conclusions(
        gather_small_bench(
            [
                *make_final_runs("sgd", [200, 300, 400]),
                *make_final_runs("sgd-again", [300] * 3),
                *make_final_runs("proxprop", [100, 150, 390]),
            ]
        )
    )
    assert "noise: no method" in find_sentence(text, "Ahead of the best baseline in steps")
    assert "use proxprop" not in text


def test_slow_steps_that_cancel_the_gain_are_reported():
    lines = make_final_runs("proxprop", [100] * 3)
    for one in lines:
        one["cpu"] = [4 * value for value in one["cpu"]]
    text = write_conclusions(
        gather_small_bench(
            [*make_final_runs("sgd", [200] * 3), *make_final_runs("sgd-again", [200] * 3), *lines]
        )
    )
    assert "Fewer steps, but not less CPU time beyond noise: proxprop" in text
    assert "Behind: proxprop" in find_sentence(text, "Ahead of the best baseline in CPU time")
    assert "If the number of steps is what counts: use proxprop." in text
    assert "If CPU time is what counts: keep to sgd" in text


def test_without_a_null_control_the_conclusions_say_so():
    text = write_conclusions(gather_small_bench([*make_final_runs("sgd", [200] * 3)], methods=("sgd",)))
    assert "There is no null control" in text


def test_misses_near_misses_failures_and_misfits_are_named():
    bench = make_bench()
    text = write_conclusions(gather_results(bench, make_lines(bench)))
    assert "missed the target: bad on 3 of 3 and local on 2 of 2." in text
    assert "The loose target was in reach of local" in text
    assert "nlms 6" in text
    assert "do not fit" in text or "does not fit" in text
    assert "local on 1" in text


def test_on_a_single_workload_misses_are_listed_by_name():
    bench = make_bench(workloads=["convs"])
    text = write_conclusions(gather_results(bench, make_lines(bench)))
    assert "missed the target: local and bad. The loose target was in reach of local." in text


def test_an_unbounded_interval_has_no_limits():
    assert format_span(Interval(0.0, 1.3, math.inf, "≥")) == "≥1.30× (without limits)"
    assert format_span(Interval(0.5, 1.3, math.inf, "≥")) == "≥1.30× (0.50 to ∞)"


def test_lower_final_metrics_are_reported_only_beyond_noise():
    def make_field(*tests, control=(0.2, 0.21, 0.22)):
        plain = (0.2, 0.21, 0.22)
        runs = [run for name in ("sgd", "sgd-again", "proxprop") for run in make_final_runs(name, [200] * 3)]
        for run, value in zip(runs, (*plain, *control, *tests), strict=True):
            run["test"] = value
        return gather_small_bench(runs)

    lower = "On digits, the test metric at the end is lower than that of sgd, beyond noise: proxprop."
    assert lower in write_conclusions(make_field(0.1, 0.11, 0.13))
    assert "lower than that" not in write_conclusions(make_field(0.1, 0.2, 0.22)), "its seeds differ as much"
    assert "lower than that" not in write_conclusions(make_field(0.1, 0.11, 0.13, control=(0.1, 0.1, 0.1))), (
        "the control does"
    )
    failed = make_field(0.1, 0.11, 0.13)
    failed.cells["tuned", "digits", "proxprop"].runs[2]["failure"] = "nan"
    assert "lower than that" not in write_conclusions(failed), "a failed seed is the worst of all"


def test_lower_memory_is_reported():
    lines = [
        *make_final_runs("sgd", [200], peak_mib=100.0),
        *make_final_runs("proxprop", [200], peak_mib=60.0),
    ]
    assert "as a multiple of sgd's: proxprop 0.60 to 0.60×." in write_conclusions(gather_small_bench(lines))
    lines[1]["peak_mib"] = 99.0
    assert "Peak memory" not in write_conclusions(gather_small_bench(lines))
    lines[0]["peak_mib"], lines[1]["peak_mib"] = 15.0, 0.5  # loading code took it, in the first trial
    assert "Peak memory" not in write_conclusions(gather_small_bench(lines))


def test_a_number_at_the_edge_of_its_range_is_named():
    bench = make_bench(["sgd"], ["digits"])
    lines = make_lines(bench)
    assert "edge of its range" not in write_conclusions(gather_results(bench, lines))
    bench["methods"]["sgd"]["space"]["lr"]["high"] = 0.1
    assert "too narrow: lr of sgd on 1 of 1" in write_conclusions(gather_results(bench, lines))


def test_few_seeds_are_reported():
    text = write_conclusions(gather_small_bench(make_final_runs("sgd", [200] * 3)))
    assert "75 %" in text
    assert "One seed tells nothing" in write_conclusions(gather_small_bench(make_final_runs("sgd", [200])))
    assert "Six seeds" not in write_conclusions(gather_small_bench(make_final_runs("sgd", [200] * 6)))


def test_without_a_tuned_baseline_there_is_no_target():
    bench = make_bench(["sgd"], ["digits"], tracks=["defaults"], trials=0)
    text = write_conclusions(
        gather_results(bench, [one for one in make_lines(bench) if one["track"] == "defaults"])
    )
    assert "since no baseline was tuned (--trials 8 tunes): every run counts as a miss on digits." in text
    bench = make_bench()
    assert "No target" not in write_conclusions(gather_results(bench, make_lines(bench)))


def test_a_bench_without_final_runs_is_reported():
    bench = make_bench()
    assert draw_conclusions(gather_results(bench, []), []) == [
        "No final run has ended yet, so that there is nothing to compare."
    ]


def test_an_adaptive_search_is_named_adaptive():
    bench = make_bench()
    assert "same luck" not in write_conclusions(gather_results(bench, make_lines(bench)))
    adaptive = {**bench, "plan": {"search": "optuna"}}
    assert "searched by optuna" in write_conclusions(gather_results(adaptive, make_lines(bench)))


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_no_winner_is_named(seeds):
    bench = make_bench()
    lines = list(make_lines(bench))
    first = {(one["method"], one["seed"]) for one in lines if one["purpose"] == "final"}
    kept = {name: sorted(seed for method, seed in first if method == name)[:seeds] for name, _ in first}
    few = [one for one in lines if one["purpose"] == "tuning" or one["seed"] in kept[one["method"]]]
    text = write_conclusions(gather_results(bench, few))
    assert ("One seed tells nothing" in text) == (seeds == 1)
    for verdict in ("beyond noise", "what counts", "lower than that of"):
        assert verdict not in text


def test_a_long_list_is_given_by_its_exceptions():
    whole = ["a", "b", "c", "d", "e", "f"]
    assert _list_some(whole, whole) == "all 6"
    assert _list_some(["a", "b", "d", "e", "f"], whole) == "all 6 but c"
    assert _list_some(["a", "b", "c", "d"], whole) == "a, b, c and d"
    assert _list_some(["a"], ["a"]) == "a"


def test_test_samples_that_were_trained_on_are_reported():
    bench = make_bench()
    digits = bench["workloads"]["digits"]
    digits["repeated"] = {"validation": 0, "test": 0}
    text = write_conclusions(gather_results(bench, make_lines(bench)))
    assert "inputs of a training sample" not in text
    for repeated, sentence_part in (
        ({"validation": 0, "test": 31}, "31 of 400 test samples of digits have"),
        (
            {"validation": 7, "test": 31},
            "7 of 397 validation samples and 31 of 400 test samples of digits have",
        ),
    ):
        digits["repeated"] = repeated
        text = write_conclusions(gather_results(bench, make_lines(bench)))
        assert sentence_part in text


def test_times_are_not_compared_if_no_baseline_reaches_the_target():
    lines = [run for name in ("sgd", "sgd-again", "proxprop") for run in make_final_runs(name, [200] * 3)]
    assert "Nobody takes less CPU time" in write_conclusions(gather_small_bench(lines))
    for run in lines[:6]:
        run["validation"] = [0.9 for _ in run["validation"]]
    text = write_conclusions(gather_small_bench(lines))
    assert "No baseline reached the target in its median run on digits: times are not compared there" in text
    assert "Nobody takes" not in text


def test_methods_that_miss_the_target_are_not_called_level():
    lines = [
        *make_final_runs("sgd", [200] * 3),
        *make_final_runs("sgd-again", [200] * 3),
        *make_final_runs("proxprop", [200] * 3),
    ]
    assert "Undecided: proxprop" in write_conclusions(gather_small_bench(lines))
    for run in lines[6:]:
        run["validation"] = [0.9 for _ in run["validation"]]
    assert "Undecided" not in write_conclusions(gather_small_bench(lines))


def test_before_tuned_runs_the_defaults_are_read():
    bench = make_bench()
    field = gather_results(bench, [one for one in make_lines(bench) if one["track"] == "defaults"])
    assert field.tracks == ["defaults"]


def test_a_workload_that_has_not_run_is_not_said_to_lack_a_target():
    bench = make_bench(["sgd", "adamw"], ["digits", "convs"])
    lines = [one for one in make_lines(bench) if one["workload"] == "digits"]
    text = write_conclusions(gather_results(bench, lines))
    assert "Nothing has been run yet on convs." in text
    assert "No target" not in text


def test_an_edge_is_reported_only_for_a_search_that_can_show_it():
    """The best of two points is at an edge wherever the two happen to be."""
    for trials, reported in ((8, True), (7, False)):
        bench = make_bench(["sgd", "adamw"], ["digits"], trials=trials)
        lines = make_lines(bench)
        for one in lines:
            one["numbers"] = {"lr": 0.99}
        assert ("edge of its range" in write_conclusions(gather_results(bench, lines))) is reported


def test_methods_with_fewer_numbers_to_tune_are_named():
    bench = make_bench(["sgd", "adamw", "proxprop"], ["digits"])
    assert "numbers to tune" not in write_conclusions(gather_results(bench, make_lines(bench)))
    space = bench["methods"]["adamw"]["space"]
    bench["methods"]["adamw"]["space"] = {**space, "weight_decay": space["lr"]}
    text = write_conclusions(gather_results(bench, make_lines(bench)))
    assert "Not all methods have 2 numbers to tune (sgd 1, proxprop 1): the same number" in text
    bench["methods"]["proxprop"]["space"] = {}
    assert "(sgd 1, proxprop none)" in write_conclusions(gather_results(bench, make_lines(bench)))
