"""The file of a full sweep: what was swept so far, so that a stopped sweep goes on where it was."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .report import Report
from .selection import Settings

ROOT = Path(__file__).parents[2]


class Ledger:
    """One line of JSON for each sample, after a line that says of what.

    Args:
        path: the file. One of other sources, settings or torch is replaced.
        settings: what is checked of each sample.
        fresh: whether to begin again in any case.
    """

    def __init__(self, path: Path, settings: Settings, *, fresh: bool = False) -> None:
        self.path = path
        self.reports: dict[str, Report] = {}
        header = {"torch": torch.__version__, "sources": digest_sources(), "settings": asdict(settings)}
        text = json.dumps(header)
        lines = [] if fresh or not path.exists() else path.read_text(encoding="utf-8").splitlines()
        if lines and lines[0] == text:
            self._load(lines[1:])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")

    def _load(self, lines: list[str]) -> None:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line that was cut off when the sweep was stopped
            self.reports[entry["sample"]] = Report.from_json(entry["report"])

    def add(self, sample: str, report: Report) -> None:
        self.reports[sample] = report
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sample": sample, "report": report.as_json()}) + "\n")

    def total(self) -> Report:
        """All reports in one."""
        total = Report()
        for report in self.reports.values():
            total.add(report)
        return total


def digest_sources() -> str:
    """Changes when plywise, its registry of rules or the sweep changes."""
    digest = hashlib.sha256()
    folders = [
        ROOT / "src" / "plywise",
        ROOT / "tests" / "sweep",
        ROOT / "tests" / "contract" / "registry.py",
    ]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
