"""Measure how much of real models each rule handles, and check that it leaves the rest unchanged.

For each family of `coverage_families` and each rule: attach to a tiny model of that family, take two steps,
and check

- the share of the parameters that the rule handles (`explain`);
- the gradients of parameters that it does not handle, against those of the model without a rule;
- resuming: a fresh copy that loads the states of model and optimizer takes the same next step;
- detaching: no hook is left, and a plain step equals that of a model without a rule.

    python benchmarks/coverage.py                          # check all; write coverage.json next to this file
    python benchmarks/coverage.py --quick                  # check three rules
    python benchmarks/coverage.py --family gpt --rule Foof
    python benchmarks/coverage.py --list                   # list the families, their sizes and times

A family whose package is not installed is skipped, with the reason. All families need these packages in
addition to torch:

    pip install --no-deps transformers timm torch_geometric diffusers peft accelerate

and what these import (huggingface_hub, safetensors, tokenizers, xxhash, psutil, requests, aiohttp, ...).
"""

import argparse
import json
import math
import platform
import re
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import plywise
from coverage_families import FAMILIES, Family
from coverage_families.checks import EQUAL, ROUNDED, WRONG, Plain, Result, check, list_rules, measure_plain

QUICK = ("Backprop", "ProxProp", "Foof")
"""The rules of ``--quick``: the identity, a rule that solves, and a rule with running statistics."""

SHARE, FAMILY_SHARE = 0.95, 0.9
"""The goal: handle this share of the parameters in this share of the families, without refusals or errors."""

LIMIT = 120
"""Seconds after which a check is aborted."""

MARKS = {EQUAL: "✓", ROUNDED: "≈", WRONG: "✗", True: "✓", False: "✗", None: "-", "": "-"}


def main() -> None:
    """Run the checks that the command line asks for."""
    options = read_options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, give_up)
    families = select(FAMILIES, options.family)
    skipped = {f.name: why for f in families if (why := f.find_obstacle())}
    families = [f for f in families if f.name not in skipped]
    if options.list:
        list_families(families)
        print_skipped(skipped)
        return
    rules = options.rule or (QUICK if options.quick else list_rules())
    print_header(rules)
    plains, results = {}, []
    for index, family in enumerate(families):
        try:
            plains[family.name] = measure_plain(family)
        except Exception as error:  # a package that its package needs may be missing
            skipped[family.name] = f"it fails without plywise: {type(error).__name__}: {error}"
            continue
        row = check_family(family, rules, plains[family.name], f"{index + 1}/{len(families)}")
        print(format_row(family, plains[family.name], row), flush=True)
        results += row
    print_skipped(skipped)
    print_findings(results)
    summary = [summarise(rule, [r for r in results if r.rule == rule], len(plains)) for rule in rules]
    print_summary(summary, len(plains))
    path = options.json or (None if is_partial(options) else Path(__file__).with_suffix(".json"))
    if path is not None:
        write_json(path, summary, plains, results, skipped)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rule", action="append", choices=list_rules(), help="check this rule only; repeat it"
    )
    parser.add_argument(
        "--family", action="append", help="check families with this in their names; repeat it"
    )
    parser.add_argument("--quick", action="store_true", help=f"check {', '.join(QUICK)} only")
    parser.add_argument("--list", action="store_true", help="list the families and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    return parser.parse_args()


def is_partial(options: argparse.Namespace) -> bool:
    """Say whether the command line asks for a part of the families or rules."""
    return bool(options.rule or options.family or options.quick)


def select(families: tuple[Family, ...], parts: list[str] | None) -> list[Family]:
    """Return the families with one of these parts in their names; a whole name selects only that family."""
    selected: set[str] = set()
    for part in (part.lower() for part in parts or [""]):
        exact = {family.name for family in families if family.name.lower() == part}
        selected |= exact or {family.name for family in families if part in family.name.lower()}
    return [family for family in families if family.name in selected]


def give_up(*_: object) -> None:
    """Stop a check that takes too long."""
    raise TimeoutError(f"took longer than {LIMIT} s")


def check_family(family: Family, rules: tuple[str, ...], plain: Plain, position: str) -> list[Result]:
    """Check one family under all rules, with progress on stderr."""
    results = []
    for rule in rules:
        if sys.stderr.isatty():
            print(f"\r\033[K{position} {family.name}: {rule}", end="", file=sys.stderr, flush=True)
        signal.alarm(LIMIT)
        try:
            results.append(check(family, rule, plain))
        finally:
            signal.alarm(0)
    seconds = sum(result.seconds for result in results)
    begin, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
    print(f"{begin}{position} {family.name}: {seconds:.1f} s", end=end, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return results


# ---- the table ---------------------------------------------------------------------------------------


def print_header(rules: tuple[str, ...]) -> None:
    """Print what the columns and marks mean."""
    print("Each cell: share of the parameters handled; then gradients of the others, resuming, detaching.")
    print(f"✓ bit-equal, ≈ equal to rounding, ✗ wrong, - not checked. plywise {plywise.__version__}.")
    print("family".ljust(28), "parameters", *(rule[:8].rjust(8) for rule in rules))


def format_row(family: Family, plain: Plain, results: list[Result]) -> str:
    """Return a family's line of the table."""
    return " ".join(
        [family.name.ljust(28), f"{plain.parameters:10,}", *(format_cell(r).rjust(8) for r in results)]
    )


def format_cell(result: Result) -> str:
    """Return one cell of the table."""
    if result.refused or result.failed:
        return "refused" if result.refused else "error"
    marks = MARKS[result.gradients] + MARKS[result.resume] + MARKS[result.detach]
    return f"{math.floor(100 * result.share)}%{marks}"


def print_skipped(skipped: dict[str, str]) -> None:
    """Print which families cannot run here, and why."""
    for why, count in Counter(skipped.values()).items():
        names = [name for name, reason in skipped.items() if reason == why]
        print(f"{count} skipped, since {why}: {', '.join(names)}")


def print_findings(results: list[Result]) -> None:
    """Print refusals, errors, wrong gradients and notes, each with the families and rules it concerns."""
    findings: dict[str, list[tuple[str, Result]]] = {}
    for result in results:
        for text in list_findings(result):
            text_start = text.split(" at ")[0] if text.startswith("gradients") else text
            kind = re.sub(r"'[^']*'|\d+|\b\w*(Model|For\w+)\b", "…", text_start.replace(result.rule, "…"))[
                :70
            ]
            findings.setdefault(kind, []).append((text, result))
    for concerned in sorted(findings.values(), key=len, reverse=True):
        print(f"\n{len(concerned)} times: {concerned[0][0].splitlines()[0][:400]}")
        print(f"   rules: {shorten([r.rule for _, r in concerned], 12)}")
        print(f"   families: {shorten([r.family for _, r in concerned], 10)}")
    left: Counter[str] = Counter()
    for result in results:
        if result.rule == results[0].rule:
            left.update(result.left)
    if left:
        print(f"\nLeft alone by {results[0].rule}, in parameters:")
    for reason, count in left.most_common(12):
        print(f"{count:10,}  {reason}")


def list_findings(result: Result) -> list[str]:
    """Return one sentence for each problem."""
    texts = [f"refused: {result.refused}"] if result.refused else []
    texts += [f"error: {result.failed}"] if result.failed else []
    texts += [f"gradients wrong, by most at {result.worst}"] if result.gradients == WRONG else []
    return texts + result.notes


def shorten(names: list[str], most: int) -> str:
    """Join the first distinct names, and say how many more there are."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- the summary -------------------------------------------------------------------------------------


def summarise(rule: str, results: list[Result], families: int) -> dict[str, Any]:
    """Count the results of a rule over all families."""
    covered = sum(result.share >= SHARE and not result.refused for result in results)
    refused = sum(bool(result.refused) for result in results)
    wrong = sum(result.is_wrong() for result in results)
    return {
        "rule": rule,
        "covered": covered,
        "refused": refused,
        "wrong": wrong,
        "wrong_gradients": sum(result.gradients == WRONG for result in results),
        "rounded_gradients": sum(result.gradients == ROUNDED for result in results),
        "wrong_resume": sum(result.resume is False for result in results),
        "wrong_detach": sum(result.detach is False for result in results),
        "errors": sum(bool(result.failed) for result in results),
        "mean_share": sum(result.share for result in results) / max(1, len(results)),
        "mean_unmoved": sum(result.unmoved for result in results) / max(1, len(results)),
        "meets_goal": covered >= math.ceil(FAMILY_SHARE * families) and not refused and not wrong,
    }


def print_summary(summary: list[dict[str, Any]], families: int) -> None:
    """Print a line for each rule, and one that compares all with the goal."""
    print(f"\n{'rule':22} >=95 %  share  unmoved  refused  wrong (gradients, resume, detach, error)  rounded")
    for s in summary:
        parts = str((s["wrong_gradients"], s["wrong_resume"], s["wrong_detach"], s["errors"]))
        print(
            f"{s['rule']:22} {s['covered']:6}  {s['mean_share']:5.0%}  {s['mean_unmoved']:7.0%}  "
            f"{s['refused']:7}  {s['wrong']:5} {parts:36} {s['rounded_gradients']:7}",
            "meets the goal" if s["meets_goal"] else "",
        )
    needed, worst = math.ceil(FAMILY_SHARE * families), min(summary, key=lambda s: s["covered"])
    refused, wrong, met = (sum(s[key] for s in summary) for key in ("refused", "wrong", "meets_goal"))
    print(
        f"\nGoal: at least {SHARE:.0%} of the parameters in {needed} of {families} families, none refused, "
        f"none wrong. {met} of {len(summary)} rules meet it; the least covered: {worst['rule']}, "
        f"{worst['covered']} families. In all {refused} refused, {wrong} wrong."
    )


def list_families(families: list[Family]) -> None:
    """Print the families that run here, with their sizes and the time of a forward and backward pass."""
    for family in families:
        start = time.perf_counter()
        plain = measure_plain(family)
        first = time.perf_counter() - start
        print(
            f"{family.name:28} {plain.parameters:10,} parameters  {1000 * plain.seconds:6.1f} ms a pass, "
            f"{first:5.2f} s with imports  {family.package or 'torch'}",
            flush=True,
        )
    print(f"{len(families)} families")


def write_json(
    path: Path, summary: list[dict[str, Any]], plains: dict[str, Plain], results: list[Result], skipped: Any
) -> None:
    """Write all results; rules with equal results in a family share a line."""
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"plywise": plywise.__version__, "torch": torch.__version__},
        "machine": platform.processor() or platform.machine(),
        "goal": {"share": SHARE, "families": FAMILY_SHARE},
        "skipped": skipped,
        "summary": summary,
        "families": [
            {"family": n, "parameters": p.parameters, "seconds": round(p.seconds, 4)}
            for n, p in plains.items()
        ],
        "results": group([trim(result, results[0].rule) for result in results]),
    }
    lines = [f'"{key}": {format_value(value)}' for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def trim(result: Result, first_rule: str) -> dict[str, Any]:
    """Return the informative fields of a result; the field ``left`` only for the first rule."""
    kept = {
        key: value
        for key, value in asdict(result).items()
        if value is False or value not in ("", [], {}, 0.0)
    }
    for key in ("unmoved", "seconds", *(("worst", "left") if result.rule != first_rule else ())):
        kept.pop(key, None)
    kept |= {key: kept[key][:200] for key in ("refused", "failed") if key in kept}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def group(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the results of a family that differ only in the rule."""
    rules: dict[str, list[str]] = {}
    for result in results:
        others = {key: value for key, value in result.items() if key not in ("family", "rule")}
        rules.setdefault(json.dumps([result["family"], others], ensure_ascii=False), []).append(
            result["rule"]
        )
    joined = [(*json.loads(found), names) for found, names in rules.items()]
    return [{"family": family, "rules": names, **others} for family, others, names in joined]


def format_value(value: Any) -> str:
    """Return JSON with a line for each entry of a list."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
