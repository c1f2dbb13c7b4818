"""What a sweep counted: checks that held, problems, refusals and skips by reason."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from plywise import PlywiseError

from .passes import UnusableError

REFUSED = "refused"


@dataclass(frozen=True)
class Problem:
    """One check that did not hold, and for what."""

    check: str
    subject: str
    rule: str
    text: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.subject} · {self.rule}: {self.text}"


@dataclass
class Report:
    """Counts of one or more subjects; reports add up."""

    held: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    subject: str = ""
    rule: str = ""

    def record(self, check: str, problem: str | None) -> None:
        """Count a check that held (``problem`` is None), or note why it did not."""
        if problem is None:
            self.held[check] += 1
        else:
            self.problems.append(Problem(check, self.subject, self.rule, problem))

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    @contextmanager
    def catching(self, may_refuse: bool, check: str = "error") -> Iterator[None]:
        """Note what is raised inside: our own errors are refusals, where they may be; others are problems."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # ours; torch's modules give others
                yield
        except UnusableError as reason:
            self.skip(str(reason))
        except PlywiseError as error:
            if may_refuse:
                self.refused[f"{self.rule}: {shorten(str(error))}"] += 1
                self.record("readable", find_unreadable(str(error)))
            else:
                self.record(check, f"{REFUSED} with {type(error).__name__}: {error}")
        except Exception as error:
            self.record(check, f"raises {type(error).__name__}: {error}")

    def add(self, other: "Report") -> None:
        self.held += other.held
        self.skipped += other.skipped
        self.refused += other.refused
        self.problems += other.problems

    def as_json(self) -> dict[str, Any]:
        problems = [[p.check, p.subject, p.rule, p.text[:1000]] for p in self.problems]
        return {
            "held": self.held,
            "skipped": self.skipped,
            "refused": self.refused,
            "problems": problems,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        return cls(
            Counter(values["held"]),
            Counter(values["skipped"]),
            Counter(values["refused"]),
            [Problem(*entry) for entry in values["problems"]],
        )


def find_unreadable(message: str) -> str | None:
    """What makes an error message one that a user cannot act on, or None."""
    text = message.strip()
    if len(text) < 30:
        return f"the message is too short: {text!r}"
    if len(text) > 1200:
        return f"the message has {len(text)} characters"
    if re.search(r" at 0x[0-9a-f]+|torch\._C|Traceback|<function|<class", text):
        return f"the message shows internals: {text!r}"
    if not re.search(r"[.!)\]:]$", text):
        return f"the message is no sentence: {text!r}"
    return None


def shorten(message: str) -> str:
    """The first sentence without names and numbers, so that equal refusals count together."""
    sentence = re.split(r"(?<=\.)\s", message.strip().splitlines()[0])[0]
    return re.sub(r"\d+", "#", re.sub(r"'[^']*'", "'…'", sentence))[:160]


def format_report(report: Report, most: int = 40) -> str:
    """The counts, and the problems grouped by check, module, rule and kind of text."""
    lines = [f"checks that held: {sum(report.held.values())}"]
    lines += [f"  {check:24} {count}" for check, count in sorted(report.held.items())]
    lines += [f"skipped: {sum(report.skipped.values())}", *format_counts(report.skipped)]
    lines += [f"refused: {sum(report.refused.values())}", *format_counts(report.refused)]
    lines += [f"problems: {len(report.problems)}"]
    groups = Counter((p.check, p.subject.split("[")[0], p.rule, shorten(p.text)) for p in report.problems)
    merged: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
    for (check, module, rule, text), count in groups.items():
        merged.setdefault((check, text), []).append((module, rule, count))
    ordered = sorted(merged.items(), key=lambda item: -sum(count for *_, count in item[1]))
    for (check, text), places in ordered[:most]:
        modules, rules = sorted({m for m, *_ in places}), sorted({r for _, r, _ in places})
        lines.append(f"  {sum(c for *_, c in places)} × [{check}] {text}")
        lines.append(f"      modules ({len(modules)}): {', '.join(modules[:12])}")
        lines.append(f"      rules ({len(rules)}): {', '.join(rules[:12])}")
    if len(ordered) > most:
        lines.append(f"  and {len(ordered) - most} more kinds")
    return "\n".join(lines)


def format_counts(counts: Counter[str]) -> list[str]:
    return [f"  {count:6} {reason}" for reason, count in counts.most_common(30)]
