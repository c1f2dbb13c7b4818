"""Results in the repository: few bytes, tables that are printed from them, ledgers that can be had again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_scripts import BENCHMARKS, REPOSITORY, import_script

sys.path.insert(0, str(Path(__file__).parent / "arena"))
from fake_bench import make_bench, make_lines, write_bench

archives, figure_tables, summaries, tables = (
    import_script(name) for name in ("archives", "figure_tables", "summaries", "tables")
)

GENERATED = (".json", ".jsonl", ".svg", ".html", ".csv", ".png", ".gz", ".xz", ".ipynb")
LIMIT = 2_000_000
"""Bytes of generated results that the repository may hold."""


def tracked_files() -> list[Path]:
    """The files of the repository, or of an unpacked source distribution."""
    listed = subprocess.run(["git", "-C", REPOSITORY, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        return [path for path in BENCHMARKS.rglob("*") if path.is_file()]
    return [REPOSITORY / name for name in listed.stdout.splitlines()]


def test_the_repository_holds_few_generated_bytes():
    files = [path for path in tracked_files() if path.suffix in GENERATED and path.exists()]
    sizes = {path.relative_to(REPOSITORY).as_posix(): path.stat().st_size for path in files}
    assert sum(sizes.values()) <= LIMIT, sorted(sizes.items(), key=lambda one: -one[1])[:10]
    summed = {name: size for name, size in sizes.items() if name.endswith("summary.json")}
    assert len(summed) == 6
    assert sum(summed.values()) < 1_500_000
    arena = [name for name in sizes if name.startswith("benchmarks/arena/")]
    ledgers = [name for name in arena if name.endswith((".jsonl", ".html"))]
    assert ledgers == [], "ledgers and reports are files of a release: benchmarks/archives.py"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_tables_are_printed_from_the_figures(page):
    text = page.read_text(encoding="utf-8")
    assert tables.MARKED.search(text), "the page has a marked table"
    assert tables.fill(text) == text, "run benchmarks/tables.py"


def test_a_figure_that_was_changed_by_hand_is_printed_again():
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    names = [found["name"] for text in texts for found in tables.MARKED.finditer(text)]
    assert sorted(names) == sorted(tables.TABLES), "each table has one place"
    for text in texts:
        for found in tables.MARKED.finditer(text):
            lines = found["table"].splitlines()[2:]
            row = next(line for line in lines if any(digit in line for digit in "0123456789"))
            at = text.index(row, found.start()) + max(row.rfind(digit) for digit in "0123456789")
            forged = f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
            assert tables.fill(forged) == text, found["name"]


def test_speeds_of_the_local_table_are_relative_to_backpropagation(tmp_path, monkeypatch):
    def run(speed: int, **beside: int) -> dict[str, object]:
        final = {"rate": 1, "alive_bytes": 8, "samples_a_second": speed, **beside}
        return {"final": [final | {"test": 50.0 + seed} for seed in range(3)]}

    entries = {
        "backpropagation": run(1000),
        "older": run(500),
        "slower machine": run(100, backpropagation_samples_a_second=80),
    }
    (tmp_path / "local_table.json").write_text(json.dumps({"workloads": {"cifar": entries}}))
    monkeypatch.setattr(figure_tables, "HERE", tmp_path)
    rows = [
        line.strip("| ").split(" | ")
        for line in figure_tables.make_local_table_writer("cifar")("").splitlines()[2:]
    ]
    speeds = {row[0]: row[-1] for row in rows}
    assert speeds == {"backpropagation": "≈ 1.0", "older": "≈ 0.5", "slower machine": "1.25"}


@pytest.fixture
def arena(tmp_path):
    """A bench in a folder, and its summary in another."""
    bench = make_bench(["sgd", "sgd-again", "proxprop"], ["digits"])
    folder = write_bench(tmp_path / "runs" / "fake", bench, make_lines(bench))
    path = tmp_path / "arena" / "fake" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(summaries.format_summary(summaries.summarise(folder)), encoding="utf-8")
    return tmp_path


def pack(arena: Path) -> Path:
    path = archives.pack("fake", arena / "dist", arena / "arena", arena / "runs")
    archives.write_digests(arena / "dist")
    return path


def test_a_summary_says_what_the_ledger_says(arena):
    whole = summaries.summarise(arena / "runs" / "fake")
    read = summaries.read_summary("fake", arena / "arena")
    assert read["findings"] == whole["findings"]
    assert read["bench"] == whole["bench"]
    for kept, row in zip(read["rows"], whole["rows"], strict=True):
        assert (kept["method"], kept["reached"], kept["runs"]) == (row["method"], row["reached"], row["runs"])
        for name in ("cpu", "cpu_ratio", "steps", "test"):
            assert (kept[name] is None) == (row[name] is None)
            numbers = [] if row[name] is None else row[name][:3]
            assert list(kept[name] or [])[:3] == pytest.approx(list(numbers), rel=1e-4)
    for track, clocks in whole["rankings"].items():
        for clock, ranks in clocks.items():
            assert [one["method"] for one in read["rankings"][track][clock]] == [r["method"] for r in ranks]


def test_an_archive_gives_the_bench_back(arena):
    path = pack(arena)
    first, ledger = path.read_bytes(), (arena / "runs" / "fake" / "trials.jsonl").read_bytes()
    shutil.rmtree(arena / "runs")
    assert pack(arena).read_bytes() == first, "from the archive itself, the same bytes"
    archives.verify(arena / "dist", arena / "arena")
    archives.unpack("fake", arena / "back", arena / "dist", arena / "arena")
    assert (arena / "back" / "trials.jsonl").read_bytes() == ledger
    assert json.loads((arena / "back" / "bench.json").read_text()) == make_bench(
        ["sgd", "sgd-again", "proxprop"], ["digits"]
    )
    assert "<html" in (arena / "back" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:200] + b"?" + b[201:], lambda _: b""])
def test_a_damaged_archive_is_refused(arena, damage):
    path = pack(arena)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(archives.ResultsError, match="Pack it again"):
        archives.verify(arena / "dist", arena / "arena")
    with pytest.raises(archives.ResultsError, match="damaged"):
        archives.unpack("fake", arena / "back", arena / "dist", arena / "arena")
    assert not (arena / "back").exists()


def test_another_ledger_is_neither_packed_nor_overwritten(arena):
    ledger = arena / "runs" / "fake" / "trials.jsonl"
    pack(arena)
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(archives.ResultsError, match="is kept"):
        archives.unpack("fake", arena / "runs" / "fake", arena / "dist", arena / "arena")
    shutil.rmtree(arena / "dist")
    with pytest.raises(archives.ResultsError, match=r"neither in .* nor in the history"):
        pack(arena)


def test_a_ledger_is_found_in_the_history_of_git(arena):
    folder = arena / "runs" / "fake"
    about = summaries.read_summary("fake", arena / "arena")["ledger"]
    git = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
    ]
    content = (folder / "trials.jsonl").read_bytes()
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "add"], ["rm", "-q", "trials.jsonl"]):
        subprocess.run([*git, *words], check=True)
    assert archives.find_ledger("fake", about, [folder / "trials.jsonl"], folder) == content


def test_the_ledgers_of_all_benches_are_in_the_history_of_git():
    def ask_git(*words):
        run = subprocess.run(["git", "-C", str(archives.REPOSITORY), *words], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    if ask_git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no clone with its history")
    about = {name: summaries.read_summary(name)["ledger"] for name in summaries.list_benches()}
    blobs = {name: ledger["git_blob"] for name, ledger in about.items() if "lost" not in ledger}
    assert [name for name, blob in blobs.items() if ask_git("cat-file", "-t", blob) != "blob"] == []
