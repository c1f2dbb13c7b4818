"""The reading of ledgers whose winner is known: what must be said, and what must not."""

from __future__ import annotations

from fake_bench import make_bench, make_lines
from test_standing import finals, small

from plywise.arena.contest import contest
from plywise.arena.findings import findings
from plywise.arena.standing import rows


def said(field) -> str:
    return "\n".join(findings(field, rows(field)))


def sentence(text: str, start: str) -> str:
    (found,) = [one for one in text.split("\n") if one.startswith(start)]
    return found


def test_a_clear_winner_is_named_with_its_ratio():
    bench = make_bench()
    text = said(contest(bench, make_lines(bench)))
    ahead = sentence(text, "Ahead of the best baseline in steps")
    assert "noise: proxprop 0.4" in ahead
    assert "Behind: " in ahead
    assert (
        sentence(text, "What counts is the number of steps")
        == "What counts is the number of steps: use proxprop."
    )
    assert "On digits, less CPU time to the target than adamw: proxprop" in text


def test_a_difference_within_the_noise_is_not_claimed():
    """A tenth fewer steps, but the null control is a quarter off."""
    quick = [*finals("sgd", [200] * 3), *finals("proxprop", [180] * 3)]
    text = said(small([*quick, *finals("sgd-again", [160] * 3)]))
    assert "noise: nobody" in sentence(text, "Ahead of the best baseline in steps")
    assert "Not to be told apart: proxprop" in text
    assert "use proxprop" not in text
    text = said(small([*quick, *finals("sgd-again", [198] * 3)]))
    assert "noise: proxprop 0.90×" in text, "a quiet control, and the same difference is told"


def test_a_method_is_not_told_apart_where_its_own_control_is_not():
    behind = {"adamw": [100] * 3, "sgd": [130] * 3}
    lines = [run for name, times in behind.items() for run in finals(name, times)]
    both = small([*lines, *finals("sgd-again", [125] * 3)], methods=("adamw", "sgd", "sgd-again"))
    assert "Behind: sgd." in sentence(said(both), "Ahead of the best baseline in steps")
    one = small([*lines, *finals("sgd-again", [104] * 3)], methods=("adamw", "sgd", "sgd-again"))
    assert "Behind" not in sentence(said(one), "Ahead of the best baseline in steps")


def test_overlapping_seeds_are_not_told_apart():
    text = said(
        small(
            [
                *finals("sgd", [200, 300, 400]),
                *finals("sgd-again", [300] * 3),
                *finals("proxprop", [100, 150, 390]),
            ]
        )
    )
    assert "noise: nobody" in sentence(text, "Ahead of the best baseline in steps")
    assert "use proxprop" not in text


def test_slow_steps_that_eat_the_gain_are_said():
    lines = finals("proxprop", [100] * 3)
    for one in lines:
        one["cpu"] = [4 * value for value in one["cpu"]]
    text = said(small([*finals("sgd", [200] * 3), *finals("sgd-again", [200] * 3), *lines]))
    assert "Fewer steps, but not less CPU time beyond noise: proxprop" in text
    assert "Behind: proxprop" in sentence(text, "Ahead of the best baseline in CPU time")
    assert "What counts is the number of steps: use proxprop." in text
    assert "What counts is CPU time: keep to sgd" in text


def test_without_a_null_control_the_reading_says_so():
    text = said(small([*finals("sgd", [200] * 3)], methods=("sgd",)))
    assert "There is no null control" in text


def test_misses_near_misses_failures_and_misfits_are_named():
    bench = make_bench()
    text = said(contest(bench, make_lines(bench)))
    assert "missed the target: local and bad. The loose target was in reach of local." in text
    assert "nlms 6" in text
    assert "do not fit" in text or "does not fit" in text
    assert "local on 1" in text


def test_lower_ends_are_told_only_where_seeds_do_not_overlap():
    def field(*tests):
        runs = [*finals("sgd", [200] * 3, test=0.2), *finals("proxprop", [200] * 3)]
        for run, value in zip(runs[3:], tests, strict=True):
            run["test"] = value
        return small(runs)

    told = "On digits, every seed ends with a lower test metric than every seed of sgd: proxprop."
    assert told in said(field(0.1, 0.15, 0.19))
    assert "lower test metric" not in said(field(0.1, 0.15, 0.2))
    failed = field(0.1, 0.15, None)
    failed.cells["tuned", "digits", "proxprop"].runs[2]["failure"] = "nan"
    assert "lower test metric" not in said(failed), "a failed seed is the worst of all"


def test_less_memory_is_told():
    lines = [*finals("sgd", [200], peak_mib=100.0), *finals("proxprop", [200], peak_mib=60.0)]
    assert "as a multiple of sgd's: proxprop 0.60 to 0.60×." in said(small(lines))
    lines[1]["peak_mib"] = 99.0
    assert "Peak memory" not in said(small(lines))


def test_a_number_at_the_edge_of_its_range_is_named():
    bench = make_bench(["sgd"], ["digits"])
    lines = make_lines(bench)
    assert "edge of its range" not in said(contest(bench, lines))
    bench["methods"]["sgd"]["space"]["lr"]["high"] = 0.1
    assert "too narrow: lr of sgd on 1 of 1" in said(contest(bench, lines))


def test_few_seeds_are_said_to_be_few():
    text = said(small(finals("sgd", [200] * 3)))
    assert "75 %" in text
    assert "One seed tells nothing" in said(small(finals("sgd", [200])))
    assert "Six seeds" not in said(small(finals("sgd", [200] * 6)))


def test_without_a_tuned_baseline_there_is_no_target():
    bench = make_bench(["sgd"], ["digits"], tracks=["defaults"], trials=0)
    text = said(contest(bench, [one for one in make_lines(bench) if one["track"] == "defaults"]))
    assert "No target, since no baseline was tuned: every run counts as a miss on digits." in text
    bench = make_bench()
    assert "No target" not in said(contest(bench, make_lines(bench)))


def test_nothing_to_read_is_said():
    bench = make_bench()
    assert findings(contest(bench, []), []) == [
        "No final run has ended yet, so that there is nothing to compare."
    ]


def test_an_adaptive_search_is_said_to_be_one():
    bench = make_bench()
    assert "same luck" not in said(contest(bench, make_lines(bench)))
    adaptive = {**bench, "plan": {"search": "optuna"}}
    assert "searched by optuna" in said(contest(adaptive, make_lines(bench)))
