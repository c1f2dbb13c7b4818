"""A bench and a diagnosis in Python: text, HTML, rows, pictures."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from plywise._util.extras import PANDAS, import_extra
from plywise._util.tables import format_number, format_table, make_table
from plywise.arena.diagnostics.advice import Advice
from plywise.arena.diagnostics.diagnosis import Diagnosis
from plywise.arena.reports.bench_page import write_page
from plywise.arena.reports.ends import has_ranking, list_standing
from plywise.arena.scoring.ranking import MethodRanking, rank_methods
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.score import CLOCKS, find_best, find_last
from plywise.arena.scoring.summary import BenchSummary
from plywise.errors import BenchError

LAYER_NUMBERS = ("rows", "backward", "backward_to_last", "silent", "rate", "noise")


@dataclass(frozen=True, repr=False)
class BenchReport:
    """The report of a bench, finished or not; ``print`` it, or show it in a notebook.

    Attributes:
        folder: where the bench is kept.
        summary: its trials, each method on each workload, and conclusions.
    """

    folder: Path
    summary: BenchSummary

    @property
    def verdict(self) -> str:
        """Whether a method is ahead of the best baseline, in a sentence."""
        return self.summary.verdict

    @property
    def conclusions(self) -> list[str]:
        """What follows from the trials, in sentences."""
        return self.summary.conclusions

    @property
    def trials(self) -> list[TrialRecord]:
        """The trials as the ledger has them, with the names that objects have for you."""
        return self.summary.lines

    def ranking(self, track: str | None = None, clock: str = "cpu") -> list[MethodRanking]:
        """Return the methods from the best on.

        Args:
            track: ``"tuned"`` or ``"defaults"``. Default: tuned, if there is anything tuned.
            clock: ``"cpu"``, ``"wall"``, ``"gradients"`` or ``"steps"``.

        Raises:
            PlywiseError: there is no such track or clock.
        """
        results = self.summary.results
        track = results.tracks[0] if track is None else track
        if track not in results.tracks or clock not in CLOCKS:
            raise BenchError(
                f"There is no ranking of track {track!r} by {clock!r}: tracks are "
                f"{', '.join(results.tracks)}; clocks are {', '.join(CLOCKS)}."
            )
        return rank_methods(results, track, clock)

    def rows(self, what: Literal["methods", "ranking", "trials"] = "methods") -> list[dict[str, Any]]:
        """Dicts for a table: each method on each workload, the ranking, or every trial.

        Raises:
            PlywiseError: ``what`` is none of these.
        """
        if what == "methods":
            return [_flatten(asdict(row)) for row in self.summary.rows]
        if what == "ranking":
            return [_flatten(asdict(one)) for one in self.ranking()]
        if what == "trials":
            return [_describe(line) for line in self.trials]
        raise BenchError(f"Rows are methods, ranking or trials, not {what!r}.")

    def to_dataframe(self, what: Literal["methods", "ranking", "trials"] = "methods") -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            PlywiseError: pandas is not installed.
        """
        return import_extra("pandas", PANDAS).DataFrame(self.rows(what))

    def plot(self, what: Literal["curves", "ranking", "rates", "pareto"] = "curves") -> Any:
        """Return a matplotlib Figure.

        Args:
            what: ``"curves"``: the validation metric while each method trains; ``"ranking"``: times to the
                target over the best baseline's; ``"rates"``: how much the end depends on the rate, over the
                tuning trials; ``"pareto"``: where methods end against the seconds they take.

        Raises:
            PlywiseError: ``what`` is none of these, or matplotlib is not installed.
        """
        from plywise.arena.reports.plots import draw

        return draw(self.summary, what)

    def write_page(self) -> Path:
        """Draw the report as an HTML page in the folder; returns its path."""
        return write_page(self.folder)[0]

    def _make_title(self) -> str:
        results = self.summary.results
        clock = ", by CPU time" if has_ranking(self.summary) else ""
        return f"{', '.join(results.workloads)}: {results.tracks[0]}{clock}"

    def __str__(self) -> str:
        if not self.summary.rows:
            return f"{self.folder}: no method has finished a run yet."
        lines = [f"- {sentence}" for sentence in self.conclusions]
        table = format_table(*list_standing(self.summary))
        return "\n".join([self._make_title(), self.verdict, table, *lines])

    __repr__ = __str__  # a notebook's file keeps it beside the table

    def _repr_html_(self) -> str:
        if not self.summary.rows:
            return f"<p>{self}</p>"
        title = f"{self._make_title()}. {self.verdict}"
        return make_table(*list_standing(self.summary), title=title, notes=self.conclusions)


@dataclass(frozen=True, repr=False)
class DiagnosisReport:
    """A diagnosis of a model before training, with advice; ``print`` it, or show it in a notebook.

    Attributes:
        diagnosis: what was seen of each layer.
        advice: what to try, the most pressing first.
        guesses: what was guessed about your data, a sentence each.
    """

    diagnosis: Diagnosis
    advice: list[Advice]
    guesses: Sequence[str] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for each layer."""
        return [_flatten(asdict(layer)) for layer in self.diagnosis.layers]

    def to_dataframe(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            PlywiseError: pandas is not installed.
        """
        return import_extra("pandas", PANDAS).DataFrame(self.rows())

    def plot(self) -> Any:
        """Return a matplotlib Figure: backward values and effective rates, layer by layer.

        Raises:
            PlywiseError: matplotlib is not installed.
        """
        from plywise.arena.reports.plots import draw_layers

        return draw_layers(self.diagnosis)

    def _list_headings(self) -> list[str]:
        return ["layer", "type", "weights", *(name.replace("_", " ") for name in LAYER_NUMBERS)]

    def _list_cells(self) -> list[list[str]]:
        return [
            [
                layer.name or "(model)",
                layer.type,
                f"{layer.inputs}→{layer.outputs}",
                *(format_number(getattr(layer, name), ".2g") for name in LAYER_NUMBERS),
            ]
            for layer in self.diagnosis.layers
        ]

    def _make_title(self) -> str:
        return f"{self.diagnosis.model}: {self.diagnosis.parameters:,} parameters"

    def _make_sentences(self) -> list[str]:
        advice = [
            f"{place}. {one.title}: {one.reason} How sure: {one.sure}"
            for place, one in enumerate(self.advice, 1)
        ]
        return [*advice, *self.guesses]

    def __str__(self) -> str:
        return "\n".join(
            [
                self._make_title(),
                format_table(self._list_headings(), self._list_cells()),
                *self._make_sentences(),
            ]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return make_table(
            self._list_headings(), self._list_cells(), title=self._make_title(), notes=self._make_sentences()
        )


def _describe(line: TrialRecord) -> dict[str, Any]:
    names = ("workload", "method", "purpose", "track", "trial", "seed", "failure", "test", "peak_mib")
    last = {clock: (line[clock] or [None])[-1] for clock in ("steps", "cpu", "wall")}
    numbers = {f"numbers.{name}": value for name, value in line["numbers"].items()}
    ends = {"best_validation": find_best(line), "last_validation": find_last(line)}
    return {**{name: line.get(name) for name in names}, **ends, **last, **numbers}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn dicts and tuples of numbers into columns of their own, and what is not finite into infinity.

    Example:
        >>> _flatten({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for name, item in value.items():
        if hasattr(item, "_asdict"):
            item = item._asdict()
        if isinstance(item, dict):
            found |= _flatten(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = math.inf if item == math.inf else item
    return found
