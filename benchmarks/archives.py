"""Pack the ledgers and reports of the arena's benches into compressed files of a release.

    python benchmarks/archives.py pack               # write archives of all benches into dist/results
    python benchmarks/archives.py verify             # check the archives in dist/results
    python benchmarks/archives.py unpack standard    # unpack into runs/arena/standard, for `plywise report`

The script looks for a ledger in dist/results, in runs/arena, and in the history of git.
"""

import argparse
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole, written_whole
from plywise.arena.reports.bench_page import make_page
from plywise.arena.scoring.summary import summarize_bench
from summaries import ARENA, describe_ledger, list_benches, read_summary

REPOSITORY = Path(__file__).parents[1]
ARCHIVES = Path("dist/results")
LEDGERS = Path("runs/arena")


class ResultsError(Exception):
    """A ledger or an archive is missing, or differs from its summary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "verify"):
        commands.add_parser(name).add_argument("folder", type=Path, nargs="?", default=ARCHIVES)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("name", choices=list_benches())
    unpacking.add_argument("--archives", type=Path, default=ARCHIVES)
    unpacking.add_argument("--to", type=Path, help="default: runs/arena/NAME")
    options = parser.parse_args()
    try:
        run(options)
    except ResultsError as error:
        sys.exit(str(error))


def run(options: argparse.Namespace) -> None:
    """Run the command of the command line."""
    if options.command == "pack":
        for name in list_benches():
            if is_lost(name):
                print(f"{name} is left out: its ledger is lost, and only its summary exists")
                continue
            path = pack(name, options.folder)
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, verified")
        write_digests(options.folder)
    elif options.command == "verify":
        verify(options.folder)
        print(f"All archives in {options.folder} agree with their summaries.")
    else:
        folder = options.to or LEDGERS / options.name
        unpack(options.name, folder, options.archives)
        print(f"{folder} contains bench.json, trials.jsonl and report.html.")


def is_lost(name: str, arena: Path = ARENA) -> bool:
    """Say whether the ledger of a bench is lost, according to its summary."""
    return "lost" in read_summary(name, arena)["ledger"]


def pack(name: str, folder: Path = ARCHIVES, arena: Path = ARENA, ledgers: Path = LEDGERS) -> Path:
    """Write the archive of a bench: bench.json, trials.jsonl and report.html.

    Packing the same bench again gives the same bytes.

    Args:
        name: name of the bench.
        folder: folder of the archive; an existing archive can serve as the source of the ledger.
        arena: folder of the summaries.
        ledgers: folder of benches that were run or unpacked on this machine.

    Returns:
        The path of the archive.

    Raises:
        ResultsError: the ledger is not found, or the archive differs from what was packed.
    """
    summary, path = read_summary(name, arena), folder / f"arena-{name}.tar.xz"
    ledger = find_ledger(name, summary["ledger"], [path, ledgers / name / "trials.jsonl"])
    bench = summary["bench"]
    lines = [json.loads(line) for line in ledger.decode("utf-8").splitlines()]
    files = {
        "bench.json": (json.dumps(bench, indent=1, ensure_ascii=False) + "\n").encode("utf-8"),
        "trials.jsonl": ledger,
        "report.html": make_page(summarize_bench(bench, lines)).encode("utf-8"),
    }
    with written_whole(path) as file, tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive:
        for member, content in files.items():
            about = tarfile.TarInfo(f"arena-{name}/{member}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    check_archive(path, summary["ledger"])
    return path


def find_ledger(
    name: str, about: dict[str, Any], paths: Iterable[Path], repository: Path = REPOSITORY
) -> bytes:
    """Return the ledger of a summary, from the first path that has it, or from the history of git.

    Args:
        name: name of the bench.
        about: the ledger's description by `describe_ledger`.
        paths: ledgers and archives; some may be missing.
        repository: folder of the git repository.

    Raises:
        ResultsError: the ledger is not found.
    """
    for source in paths:
        if not source.exists():
            continue
        content = (
            source.read_bytes()
            if source.suffix == ".jsonl"
            else read_archive(source).get("trials.jsonl", b"")
        )
        if describe_ledger(content) == about:
            return content
    command = ["git", "-C", str(repository), "cat-file", "blob", about["git_blob"]]
    git = subprocess.run(command, capture_output=True)
    if git.returncode == 0 and describe_ledger(git.stdout) == about:
        return git.stdout
    raise ResultsError(
        f"The ledger of the bench {name} (sha256 {about['sha256'][:12]}...) is neither in "
        f"{', '.join(map(str, paths))} nor in the history of git. Put its archive, a file of the release, "
        "there. In a shallow clone, `git fetch --unshallow` fetches the history."
    )


def read_archive(path: Path) -> dict[str, bytes]:
    """Return the files of an archive by name, without their folder; empty if it is damaged."""
    try:
        content = io.BytesIO(lzma.decompress(path.read_bytes()))  # tarfile alone accepts a truncated file
        with tarfile.open(fileobj=content) as archive:
            return {
                Path(member.name).name: archive.extractfile(member).read()
                for member in archive
                if member.isfile()
            }
    except (lzma.LZMAError, tarfile.TarError):
        return {}


def check_archive(path: Path, about: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of an archive, after checking its ledger against the summary.

    Raises:
        ResultsError: the ledger differs, or a file is missing.
    """
    files = read_archive(path)
    if (
        set(files) != {"bench.json", "trials.jsonl", "report.html"}
        or describe_ledger(files["trials.jsonl"]) != about
    ):
        raise ResultsError(
            f"{path} is damaged, or is not the archive that its summary describes. Pack it again."
        )
    return files


def write_digests(folder: Path) -> Path:
    """Write SHA256SUMS, which `sha256sum --check` reads, for the archives of a folder."""
    archives = sorted(folder.glob("*.tar.xz"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives]
    return write_whole(folder / "SHA256SUMS", "".join(lines))


def verify(folder: Path = ARCHIVES, arena: Path = ARENA) -> None:
    """Check the archives of all benches against their summaries and SHA256SUMS.

    Raises:
        ResultsError: an archive is missing or differs.
    """
    sums = folder / "SHA256SUMS"
    digests = dict(line.split()[::-1] for line in sums.read_text().splitlines()) if sums.exists() else {}
    for name in [name for name in list_benches(arena) if not is_lost(name, arena)]:
        path = folder / f"arena-{name}.tar.xz"
        if not path.exists() or digests.get(path.name) != hashlib.sha256(path.read_bytes()).hexdigest():
            raise ResultsError(f"{path} is missing, or is not the file that {sums} names. Pack it again.")
        check_archive(path, read_summary(name, arena)["ledger"])


def unpack(name: str, folder: Path, archives: Path = ARCHIVES, arena: Path = ARENA) -> None:
    """Unpack the files of a bench into a folder for `plywise report`.

    Raises:
        ResultsError: the ledger is not found, or the folder contains another one.
    """
    about = read_summary(name, arena)["ledger"]
    ledger = folder / "trials.jsonl"
    if ledger.exists() and describe_ledger(ledger.read_bytes()) != about:
        raise ResultsError(f"{ledger} is another ledger, and is kept. Choose another folder with --to.")
    path = archives / f"arena-{name}.tar.xz"
    if not path.exists():
        pack(name, archives, arena)
    for member, content in check_archive(path, about).items():
        with written_whole(folder / member) as file:
            file.write(content)


if __name__ == "__main__":
    main()
