"""Records: every entry that is kept can be checked, and an entry says what the bench's trials say."""

import copy
import json
import math
import random
import statistics

import pytest

from arena.fake_bench import line, make_bench
from benchmark_scripts import import_script
from plywise.arena.scoring.results import gather_results

records = import_script("records")
METHODS = ["sgd", "sgd-again", "adamw", "muon", "soap", "foof"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bench_of(seeds=5, trials=8, methods=METHODS, workloads=("digits-mlp",)):
    bench = make_bench(methods, workloads, trials=trials, seeds=list(range(seeds)))
    for name in methods:
        bench["methods"][name] |= {"baseline": name in ("sgd", "adamw", "muon", "soap")}
    for one in bench["workloads"].values():
        one["target"] = 0.1
    return bench


def runs(method, times, workload="digits-mlp"):
    """Final runs that reach 0.1 at these steps, a hundredth of a second each; infinity: never."""
    return [
        line(
            workload,
            method,
            "final",
            "tuned",
            0,
            seed,
            steps=[0, 400 if math.isinf(when) else when, 900],
            validation=[0.9, 0.5 if math.isinf(when) else 0.1, 0.4 if math.isinf(when) else 0.05],
            cpu=[0.0, *([4.0] if math.isinf(when) else [0.01 * when]), 9.0],
        )
        for seed, when in enumerate(times)
    ]


def ledger(**times):
    usual = {"sgd": [300, 310, 290, 305, 295], "sgd-again": [302, 308, 292, 301, 297]}
    usual |= {"adamw": [400] * 5, "muon": [200] * 5, "soap": [250] * 5, "foof": [100] * 5}
    return [run for name, when in {**usual, **times}.items() for run in runs(name, when)]


# ---- what is kept ------------------------------------------------------------------------------------


def test_every_entry_that_is_kept_is_as_it_must_be():
    """`read_records` checks fields, date, commit, command, and that methods and workloads exist."""
    kept = records.read_records()
    assert kept, "the page is not empty"
    keys = [(one["method"], one["commit"], one["command"]) for one in kept]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": "22.11.2026"}, "no date"),
        ({"commit": "main"}, "7 or 40 hexadecimal digits, unlike 'main'"),
        ({"commit": COMMIT[:12]}, "7 or 40"),
        ({"method": "foofoof"}, "nothing is called foofoof"),
        ({"command": "python my_bench.py"}, "no plywise bench"),
        ({"trials": 4}, "fewer than 8"),
        ({"seeds": 3}, "fewer than 5"),
        ({"workloads": {}}, "no workload"),
        ({"speed": 3}, "its fields are"),
    ],
)
def test_a_wrong_entry_is_refused_by_what_is_wrong_with_it(change, message):
    record = records.make_record(bench_of(), ledger(), "foof", COMMIT)
    records.check_record(record)
    with pytest.raises(records.RecordError, match=message):
        records.check_record({**record, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "few"}, "not a number"),
        ({"best_peer_cpu": "muoon"}, "nothing is called muoon"),
        ({"wall": 1.0}, "its figures on digits-mlp are"),
    ],
)
def test_a_wrong_figure_is_refused(change, message):
    record = copy.deepcopy(records.make_record(bench_of(), ledger(), "foof", COMMIT))
    record["workloads"]["digits-mlp"] |= change
    with pytest.raises(records.RecordError, match=message):
        records.check_record(record)
    moved = {**record, "workloads": {"digits-mpl": record["workloads"]["digits-mlp"]}}
    with pytest.raises(records.RecordError, match=r"nothing is called (digits-mpl|muoon)"):
        records.check_record(moved)


# ---- what an entry says ------------------------------------------------------------------------------


def test_an_entry_says_what_the_trials_say():
    record = records.make_record(bench_of(), ledger(), "foof", COMMIT)
    about = (record["date"], record["commit"], record["trials"], record["seeds"])
    assert about == ("2026-11-21", COMMIT, 8, 5)
    figures = record["workloads"]["digits-mlp"]
    assert (figures["reached"], figures["steps"], figures["cpu"]) == ("5 of 5", 100, 1)
    assert (figures["best_peer_steps"], figures["peer_steps"]) == ("muon", 200)
    logs = [math.log(when) for when in (300, 310, 290, 305, 295, 302, 308, 292, 301, 297)]
    wanted = math.log(2) / (statistics.stdev(logs) * math.sqrt(2 / 5))
    assert figures["z_steps"] == pytest.approx(wanted, rel=5e-3), "three digits are kept"
    assert figures["noise"] == "here"


def test_a_baseline_is_compared_with_the_others():
    figures = records.make_record(bench_of(), ledger(), "muon", COMMIT)["workloads"]["digits-mlp"]
    assert (figures["best_peer_steps"], figures["peer_steps"]) == ("soap", 250)
    assert figures["z_steps"] > 0


def test_a_miss_has_no_z_and_a_peer_that_missed_is_not_named():
    missed = ledger(foof=[100, 100, 100, 100, math.inf])
    figures = records.make_record(bench_of(), missed, "foof", COMMIT)["workloads"]["digits-mlp"]
    assert (figures["reached"], figures["steps"], figures["z_steps"]) == ("4 of 5", 100, None)
    never = {name: [math.inf] * 5 for name in ("sgd", "adamw", "muon", "soap")}
    figures = records.make_record(bench_of(), ledger(**never), "foof", COMMIT)["workloads"]["digits-mlp"]
    assert (figures["best_peer_cpu"], figures["peer_cpu"], figures["z_cpu"]) == (None, None, None)
    assert figures["noise"] is None, "the null control missed everywhere"


def test_where_the_null_control_missed_its_noise_is_that_of_other_workloads():
    names = ("digits-mlp", "quadratic")
    bench, misses = bench_of(workloads=names), [math.inf] * 5
    elsewhere = [run | {"workload": "quadratic"} for run in ledger()]
    lines = [*ledger(**{"sgd": misses, "sgd-again": misses}), *elsewhere]
    found = records.make_record(bench, lines, "foof", COMMIT)["workloads"]
    assert [found[name]["noise"] for name in names] == ["elsewhere", "here"]
    assert found["digits-mlp"]["z_steps"] == found["quadratic"]["z_steps"]


def test_of_equal_methods_z_is_about_standard_normal():
    """The null control's noise is that of all: then one in twenty is beyond 2, as the page says."""
    chance, values = random.Random(0), []
    for _ in range(300):
        draw = {
            name: [round(100_000 * math.exp(chance.gauss(0, 0.2))) for _ in range(6)]
            for name in ("sgd", "sgd-again", "adamw", "foof")
        }
        results = gather_results(
            bench_of(6, methods=["sgd", "sgd-again", "adamw", "foof"]),
            [run for name, when in draw.items() for run in runs(name, when)],
        )
        noise, _ = records.find_noise(results, "digits-mlp", "steps")
        values.append(records.find_z(draw["foof"], draw["adamw"], noise))
    assert abs(statistics.fmean(values)) < 0.2
    assert 0.85 < statistics.stdev(values) < 1.3
    assert 0.01 < sum(abs(value) > 2 for value in values) / len(values) < 0.12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 4}, "8 tuning trials"),
        ({"seeds": 3}, "5 seeds"),
        ({"methods": ["sgd", "adamw", "muon", "soap", "foof"]}, "null control"),
        ({"methods": ["sgd", "sgd-again", "adamw", "foof"]}, "3 baselines"),
        ({"methods": METHODS[:-1]}, "no method foof"),
    ],
)
def test_a_bench_that_is_too_small_gives_no_record(change, message):
    methods = change.get("methods", METHODS)
    lines = [one for one in ledger() if one["method"] in methods]
    with pytest.raises(records.RecordError, match=message):
        records.make_record(bench_of(**change), lines, "foof", COMMIT)


def test_a_workload_that_ranks_nobody_gives_no_record():
    bench = bench_of()
    bench["workloads"]["digits-mlp"]["target"] = 0.8
    with pytest.raises(records.RecordError, match="on a workload that ranks methods"):
        records.make_record(bench, ledger(), "foof", COMMIT)


# ---- the file and the page ---------------------------------------------------------------------------


def test_an_entry_that_is_made_again_replaces_itself(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("[]")
    for method, steps in (("foof", 100), ("muon", 200), ("foof", 120)):
        record = records.make_record(bench_of(), ledger(**{method: [steps] * 5}), method, COMMIT)
        records.add_record(record, path)
    kept = json.loads(path.read_text())
    assert [(one["method"], one["workloads"]["digits-mlp"]["steps"]) for one in kept] == [
        ("foof", 120),
        ("muon", 200),
    ]


def test_the_page_shows_who_reached_the_target_the_quickest_first(monkeypatch):
    slow = records.make_record(bench_of(), ledger(), "soap", COMMIT)
    quick = records.make_record(bench_of(), ledger(), "foof", COMMIT)
    missed = records.make_record(bench_of(), ledger(adamw=[math.inf] * 5), "adamw", COMMIT)
    monkeypatch.setattr(records, "read_records", lambda: [slow, missed, quick])
    rows = records.format_records("").splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["foof", "soap"]
    assert "100 (muon 200)" in rows[0]
    assert rows[0].endswith(f"2026-11-21, `{COMMIT[:7]}` |")
