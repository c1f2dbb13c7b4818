"""`plywise doctor`: is everything here, and does it train?"""

from __future__ import annotations

from functools import partial

from plywise.cli.console import console, notes, print_json, table
from plywise.cli.training import Switch

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
    from plywise.arena.demo.setups import SETUPS
    from plywise.arena.run.trial import run_trial
    from plywise.arena.workloads import find_workload

    workload = find_workload("digits-mlp")
    data = workload.make_data()
    verdicts = {}
    for setup in SETUPS:
        if setup.rule is None:
            continue
        train = partial(setup.train, workload.make_model)
        record = run_trial(train, data, workload.task, seed=0, steps=STEPS, batch_size=workload.batch_size)
        first, last = record.loss[0], record.final_loss
        if first is None or last is None:
            verdicts[setup.name] = record.failure or "it measured nothing"
        else:
            falls = last < first
            change = f"loss {first:.2f} → {last:.2g}"
            verdicts[setup.name] = f"OK, {change}" if falls else f"the loss does not fall: {change}"
    return verdicts
