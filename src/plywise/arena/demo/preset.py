"""`plywise demo` is a bench: one workload, settings that have been tuned before, and a sweep over rates."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plywise._util.file_errors import require_file
from plywise._util.scratch import Scratch
from plywise.arena.demo.layer_picture import layer_picture
from plywise.arena.demo.setups import SETUPS, make_methods
from plywise.arena.method import Numbers
from plywise.arena.methods import PEERS, RULE_OF
from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, ObjectSource, ResolvedBench, ResolvedWorkload, WorkloadSpec
from plywise.arena.run.experiment import Design
from plywise.arena.scoring.records import TUNED
from plywise.arena.workload import Workload
from plywise.data.batches import endless_batches
from plywise.data.digits import ATTRIBUTION
from plywise.data.parts import Data
from plywise.errors import CommandError
from plywise.registry.find import find_rule

TITLE = "plywise demo: handwritten digits"
MEASURE_EVERY = 5
"""Steps between two measurements."""
TARGET = 0.08
"""Validation error that is the target: 23 of 297 images. SGD, AdamW and Muon reach it with every seed, so
that times are compared and not misses, and the null control has times to learn the noise from."""


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo does; the defaults take about half a minute on one core.

    Attributes:
        seeds: runs of each method.
        steps: steps of a run.
        sweep_steps: steps of a run of the sweep over rates.
        rates: rates of the sweep, from a tenth of the tuned one to ten times that.
        setups: the methods that are compared, and their numbers.
    """

    seeds: int = 3
    steps: int = 100
    sweep_steps: int = 25
    rates: int = 5
    setups: Mapping[str, Numbers] = field(default_factory=lambda: SETUPS)


def make_workload(config: DemoConfig) -> Workload:
    """Return the digits, measured more often than in a bench."""
    workload = WorkloadSpec("digits-mlp", steps=config.steps).make()
    return replace(workload, measure_every=MEASURE_EVERY, target=TARGET)


@contextmanager
def open_demo(config: DemoConfig, folder: Path, command: str = "") -> Generator[Bench, None, None]:
    """Yield the demo as a bench in ``folder``, where it begins again.

    Raises:
        PlywiseError: the folder holds another bench.
    """
    methods = {method.name: method for method in make_methods(config.setups, config.rates)}
    source = ObjectSource(make_workload(config), methods)
    asked = BenchConfig((WorkloadSpec(source.name),), tuple(methods), config.rates, config.seeds)
    design = Design(
        config.seeds,
        tracks=(TUNED,),
        chosen=True,
        tuning_steps=config.sweep_steps,
        tuning_every=config.sweep_steps,
    )
    _clear(folder)
    with Scratch(folder) as scratch:
        workload = ResolvedWorkload.write(source, source.workload, scratch.path / "digits.pt")
        about = {
            "title": TITLE,
            "lead": _format_lead(config),
            "tracks": [TUNED],
            "chosen": True,
            "attribution": ATTRIBUTION,
        }
        resolved = ResolvedBench(asked, methods, {source.name: workload}, {})
        bench = Bench(resolved, folder, command, design, about)
        picture = _measure_picture(config, Data.load(workload.file), workload.workload)
        for name, layers in picture.items():
            bench.about["methods"][name]["layers"] = layers
        yield bench


def _format_lead(config: DemoConfig) -> str:
    seeds = f"{config.seeds} fresh seed{'s' if config.seeds != 1 else ''}"
    return (
        f"{len(config.setups)} methods train one network on handwritten digits: {config.steps} steps with "
        f"numbers that were tuned on validation images before, {seeds} each."
    )


def _clear(folder: Path) -> None:
    """Remove a demo that was there before."""
    about = folder / "bench.json"
    if about.exists() and TITLE not in require_file(about).read_text(encoding="utf-8"):
        raise CommandError(f"{folder} holds a bench; name another folder with --out.")
    for name in ("bench.json", "trials.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _measure_picture(config: DemoConfig, data: Data, workload: Workload) -> dict[str, dict[str, Any]]:
    """Measure the backward values, layer by layer, of plain training and of rules of one batch."""
    rules = {name: find_rule(RULE_OF[name])() for name in config.setups if name in RULE_OF}
    shown = {
        PEERS[0]: find_rule("Backprop")(),
        **{n: rule for n, rule in rules.items() if not rule.remembers},
    }
    batch = next(endless_batches(data.train, workload.batch_size, 0))
    return layer_picture(workload.make_model, {n: shown[n] for n in shown if n in config.setups}, *batch)
