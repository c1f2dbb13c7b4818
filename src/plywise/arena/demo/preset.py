"""`plywise demo` is a bench: one workload, settings that have been tuned before, and a sweep over rates."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plywise._util.scratch import Scratch
from plywise.arena.demo.layer_picture import layer_picture
from plywise.arena.demo.setups import SETUPS, Setup
from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, ObjectSource, ResolvedBench, ResolvedWorkload, WorkloadSpec
from plywise.arena.run.experiment import Design
from plywise.arena.scoring.records import TUNED
from plywise.arena.workload import Workload
from plywise.data.batches import endless_batches
from plywise.data.digits import ATTRIBUTION
from plywise.data.parts import Data
from plywise.errors import PlywiseError

TITLE = "plywise demo: handwritten digits"
MEASURE_EVERY = 5
"""Steps between two measurements."""
TRAINING_IMAGES = 1_100
"""All of them: the training loss is measured on these."""


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo does; the defaults take about a minute on one core.

    Attributes:
        seeds: runs of each setup.
        steps: steps of a run.
        sweep_steps: steps of a run of the sweep over rates.
        rates: rates of the sweep, over four decades around the tuned one.
        setups: what is compared.
    """

    seeds: int = 3
    steps: int = 300
    sweep_steps: int = 100
    rates: int = 9
    setups: tuple[Setup, ...] = SETUPS


def make_workload(config: DemoConfig) -> Workload:
    """The digits, measured more often than in a bench, and on all training images."""
    workload = WorkloadSpec("digits-mlp", steps=config.steps).make()
    return replace(workload, measure_every=MEASURE_EVERY, train_eval_size=TRAINING_IMAGES)


@contextmanager
def open_demo(config: DemoConfig, folder: Path, command: str = "") -> Generator[Bench, None, None]:
    """The demo as a bench in ``folder``, where it begins again.

    Raises:
        PlywiseError: the folder holds another bench.
    """
    methods = {setup.name: setup.as_method(config.rates) for setup in config.setups}
    source = ObjectSource(make_workload(config), methods)
    asked = BenchConfig((WorkloadSpec(source.name),), tuple(methods), config.rates, config.seeds)
    design = Design(
        config.seeds,
        tracks=(TUNED,),
        chosen=True,
        tuning_seed=0,
        tuning_steps=config.sweep_steps,
        tuning_every=config.sweep_steps,
        null_offset=0,
    )
    _clear(folder)
    with Scratch(folder) as scratch:
        workload = ResolvedWorkload.write(source, source.workload, scratch.path / "digits.pt")
        about = {
            "title": TITLE,
            "lead": _lead(config),
            "tracks": [TUNED],
            "chosen": True,
            "attribution": ATTRIBUTION,
        }
        resolved = ResolvedBench(asked, methods, {source.name: workload}, {})
        bench = Bench(resolved, folder, command, design, about)
        picture = _picture(config, Data.load(workload.file), workload.workload)
        for name, layers in picture.items():
            bench.about["methods"][name]["layers"] = layers
        yield bench


def _lead(config: DemoConfig) -> str:
    return (
        f"{len(config.setups)} ways to train one network on handwritten digits: {config.steps} steps with "
        f"settings that have been tuned on validation images, {config.seeds} "
        f"seed{'s' if config.seeds != 1 else ''} each; and a sweep over rates."
    )


def _clear(folder: Path) -> None:
    """Remove a demo that was there before."""
    about = folder / "bench.json"
    if about.exists() and TITLE not in about.read_text(encoding="utf-8"):
        raise PlywiseError(f"{folder} holds a bench; name another folder with --out.", see="error-command")
    for name in ("bench.json", "trials.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _picture(config: DemoConfig, data: Data, workload: Workload) -> dict[str, dict[str, Any]]:
    """How large the backward values are, layer by layer, of rules that send down values of their own."""
    rules = {setup.name: rule for setup in config.setups if (rule := setup.make_rule()) is not None}
    own = {name: rule for name, rule in rules.items() if not rule.remembers}
    return layer_picture(workload.make_model, own, *next(endless_batches(data.train, workload.batch_size, 0)))
