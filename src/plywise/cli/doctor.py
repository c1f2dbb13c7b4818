"""`plywise doctor`: checks the installation, and that each rule trains."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from plywise.cli.console import console, notes, print_json, table
from plywise.cli.training import Switch

if TYPE_CHECKING:
    from plywise.arena.method import Method, Trainer
    from plywise.arena.run.trial import TrialResult
    from plywise.arena.workload import Workload
    from plywise.data.parts import Data

STEPS = 20


def doctor(*, json: Switch = False) -> int:
    """Show versions, processor and devices, and train 20 steps with each rule.

    The exit code is 1 if a rule does not train.

    Args:
        json: print it as JSON.
    """
    import torch

    from plywise._util.environment import environment

    screen, facts = notes(json) if json else console(), table("what", "here")
    for key, value in environment().items():
        facts.add_row(key, str(value))
    screen.print(facts)
    torch.set_num_threads(1)
    verdicts = self_check()
    well = all(verdict.startswith("OK") for verdict in verdicts.values())
    if json:
        print_json({"environment": environment(), "rules": verdicts, "well": well})
        return 0 if well else 1
    checks = table("rule", f"{STEPS} steps")
    for name, verdict in verdicts.items():
        checks.add_row(name, verdict)
    screen.print(checks)
    screen.print("All rules train." if well else "Something is wrong: see the rules above that are not OK.")
    return 0 if well else 1


def self_check() -> dict[str, str]:
    """Train each rule for a moment on the bundled digits; "OK …" for each that lowers the loss."""
    from plywise.arena.methods import RULE_OF, find_method
    from plywise.arena.run.trial import run_trial
    from plywise.arena.workloads import find_workload

    workload = find_workload("digits-mlp")
    data = workload.make_data()
    verdicts = {}
    for name, rule in RULE_OF.items():
        begin = partial(_begin, find_method(name), workload, data)
        record = run_trial(begin, data, workload.task, seed=0, steps=STEPS, batch_size=workload.batch_size)
        verdicts[rule] = _judge(record)
    return verdicts


def _begin(method: Method, workload: Workload, data: Data) -> Trainer:
    """Return a method at its defaults, about to train."""
    from plywise.arena.method import TrialContext
    from plywise.arena.space import get_defaults

    model, example = workload.make_model(), data.train.head(1).x
    return method.make(TrialContext(model, workload.task, get_defaults(method.space), STEPS, example))


def _judge(record: TrialResult) -> str:
    first, last = record.loss[0] if record.loss else None, record.final_loss
    if first is None or last is None:
        return record.failure or "it measured nothing"
    change = f"loss {first:.3f} → {last:.3f}"
    return f"OK, {change}" if last < first else f"the loss does not fall: {change}"
