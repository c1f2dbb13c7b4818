"""A reproduction as a table: Markdown for files, rows for the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from plywise.arena.reproductions.experiment import SIZE_WORDS
from plywise.arena.reproductions.summary import REPRODUCED, REVERSED
from plywise.arena.scoring.verdicts import UNDECIDED

HEADINGS = ("method", "paper", "ours (95 % interval)", "verdict")


def make_rows(experiment: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each arm: method, the paper's number, ours, verdict."""
    return [
        (_format_method(arm), write_number(arm["paper"]), write_ours(arm), arm["verdict"])
        for arm in experiment["arms"]
    ]


def write_number(value: float | None) -> str:
    """Return a number in a table.

    Example:
        >>> write_number(None), write_number(float("nan")), write_number(0.0123456), write_number(86.3)
        ('–', 'diverged', '0.0123', '86.3')
    """
    if value is None:
        return "–"
    return "diverged" if math.isnan(value) else format(value, ".3g")


def write_ours(arm: Mapping[str, Any]) -> str:
    """Mean and interval of an arm, and how many of its runs failed.

    Example:
        >>> write_ours({"mean": 1.0, "low": 0.5, "high": 1.5, "values": {0: 0.9, 1: 1.1}, "failures": {}})
        '1 (0.5 to 1.5)'
    """
    failed, runs = len(arm["failures"]), len(arm["failures"]) + len(arm["values"])
    if not arm["values"]:
        return f"diverged ({failed} of {runs})"
    limits = "" if arm["low"] is None else f" ({arm['low']:.3g} to {arm['high']:.3g})"
    return f"{arm['mean']:.3g}{limits}" + (f"; {failed} of {runs} diverged" if failed else "")


def describe_claims(experiment: Mapping[str, Any]) -> list[str]:
    """Say the result of the paper's claims in sentences, one for each outcome."""
    claims = experiment["claims"]
    found = {
        outcome: [claim["claim"] for claim in claims if claim["outcome"] == outcome]
        for outcome in (REPRODUCED, REVERSED, UNDECIDED)
    }
    return [
        f"{len(names)} of {len(claims)} {outcome}: {'; '.join(names)}."
        for outcome, names in found.items()
        if names
    ]


def make_markdown(about: Mapping[str, Any]) -> str:
    """Return the whole reproduction."""
    lines = [f"## {about['paper']}", ""]
    if about["unfinished"]:
        lines += [f"{about['unfinished']} runs have not been run yet.", ""]
    for experiment in about["experiments"]:
        lines += _format_section(about, experiment)
    return "\n".join(lines)


def _format_section(about: Mapping[str, Any], experiment: Mapping[str, Any]) -> list[str]:
    size = SIZE_WORDS[about["size"]]
    lines = [
        f"### {experiment['name']}: {experiment['about']}",
        "",
        f"In the paper: {experiment['where']}. Measured: {experiment['measure']}, {experiment['unit']}. "
        f"Run at {size}: {experiment['size']}. Seeds: {about['seeds']}; {experiment['seconds']:.0f} s in "
        "all. Intervals are where one more run is expected (Student's t; losses as logarithms).",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|" + "---|" * len(HEADINGS),
        *(f"| {' | '.join(row)} |" for row in make_rows(experiment)),
        "",
    ]
    if sentences := describe_claims(experiment):
        lines += ["The paper's order of methods:", "", *(f"- {one}" for one in sentences), ""]
    lines += ["Why our numbers may differ:", "", *(f"- {one}" for one in experiment["differences"]), ""]
    return lines


def _format_method(arm: Mapping[str, Any]) -> str:
    chosen = f" (rate {arm['rate']:g} of {', '.join(arm['tuning'])})" if arm["tuning"] else ""
    return f"{arm['arm']}{chosen}"
