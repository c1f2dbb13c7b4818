"""The ledger has one line per trial, written completely or not at all."""

import json
import multiprocessing
import resource

import pytest

from plywise._util.sealed import unseal
from plywise.arena.run.ledger import Ledger, read
from plywise.arena.scoring.records import Key, make_key
from plywise.errors import PlywiseError


def line(trial, **more):
    return {**Key("w", "m", "tuning", "tuned", trial, 0)._asdict(), "validation": [1.0, 0.5], **more}


def test_added_lines_are_there_after_reopening(tmp_path):
    path = tmp_path / "folder" / "trials.jsonl"
    ledger = Ledger(path)
    for trial in range(3):
        ledger.add(line(trial))
    again = Ledger(path)
    assert again.lines == ledger.lines
    assert list(again.lines.values()) == list(read(path)) == [line(trial) for trial in range(3)]
    assert make_key(line(2)) in again
    assert make_key(line(3)) not in again


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_a_crash_cut_off_is_taken_away(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path)
    ledger.add(line(0))
    whole = path.read_bytes()
    ledger.add(line(1))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Ledger(path)
    assert list(again.lines.values()) == [line(0)]
    with again.writing():
        assert path.read_bytes() == whole
        again.add(line(1))
    assert [one["trial"] for one in read(path)] == [0, 1]


@pytest.mark.parametrize("text", ["hello\n", "{}\n", "[1]\n", '{"workload": "w"}\n', "\0\0\0\n", "\n"])
def test_a_foreign_line_is_named_and_moved_aside(tmp_path, text):
    path = tmp_path / "trials.jsonl"
    Ledger(path).add(line(0))
    with path.open("a") as file:
        file.write(text)
    Ledger(path).add(line(1))
    with pytest.raises(PlywiseError, match=r"Line 2 of .*trials.jsonl is not a trial .* The command .* sets"):
        list(read(path))
    again = Ledger(path)
    assert [key.trial for key in again.lines] == [0, 1]
    with (
        pytest.warns(RuntimeWarning, match=r"damaged in line 2 .* trials\.damaged now, .* run again"),
        again.writing(),
    ):
        pass
    assert [one["trial"] for one in read(path)] == [0, 1]
    assert path.with_suffix(".damaged").read_text() == text


def test_a_trial_that_is_there_twice_counts_once(tmp_path):
    path = tmp_path / "trials.jsonl"
    for trial in range(2):
        Ledger(path).add(line(trial))
    path.write_bytes(path.read_bytes() * 2)
    assert [one["trial"] for one in read(path)] == [0, 1]
    assert len(Ledger(path).lines) == 2


def test_two_results_of_one_trial_are_named(tmp_path):
    path = tmp_path / "trials.jsonl"
    Ledger(path).add(line(0))
    Ledger(tmp_path / "other.jsonl").add(line(0, validation=[0.1]))
    path.write_bytes(path.read_bytes() + (tmp_path / "other.jsonl").read_bytes())
    with pytest.raises(PlywiseError, match=r"Line 2 of .* another result of the same trial"):
        list(read(path))
    assert Ledger(path).lines == {make_key(line(0)): line(0)}


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Flips each bit of two lines and of their ends, one after the other."""
    path = tmp_path / "trials.jsonl"
    for trial in range(3):
        Ledger(path).add(line(trial))
    content = path.read_bytes()
    last = content.index(b"\n", content.index(b"\n") + 1) + 1
    for bit in range(8 * last):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(PlywiseError, match=r"Line \d of .*trials.jsonl is not a trial"):
            list(read(path))


def test_ledgers_of_older_versions_are_continued(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(line(0)) + "\n")
    with (ledger := Ledger(path)).writing():
        ledger.add(line(1))
    assert list(read(path)) == [line(0), line(1)]


def test_values_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Ledger(tmp_path / "trials.jsonl").add(line(0, validation=[float("nan")]))
    assert list(read(tmp_path / "trials.jsonl")) == []


def test_two_do_not_write_at_once(tmp_path):
    path = tmp_path / "trials.jsonl"
    first, second = Ledger(path), Ledger(path)
    with first.writing():
        first.add(line(0))
        with pytest.raises(PlywiseError, match="Another process is adding trials"), second.writing():
            pass
    with second.writing():
        assert make_key(line(0)) in second, "what the other one wrote is known"


def fill(path, answer):
    ledger = Ledger(path)
    ledger.add(line(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40,) * 2)
    try:
        ledger.add(line(1))
    except PlywiseError as error:
        answer.put(str(error))


def test_a_full_disk_loses_nothing_and_says_so(tmp_path):
    path = tmp_path / "trials.jsonl"
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=fill, args=(path, answer))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "The 1 trials before are kept" in answer.get()
    assert [one["trial"] for one in read(path)] == [0]
    assert unseal(path.read_text()) == line(0)
