"""`plywise workloads`: lists the workloads of `plywise bench` and fetches their data."""

from __future__ import annotations

from cyclopts import App

from plywise.cli.console import console, number, print_json, table
from plywise.cli.training import Switch

app = App(
    name="workloads",
    help="List the workloads of `plywise bench`; `plywise workloads fetch NAME` downloads their data.",
)


@app.default
def workloads(*, json: Switch = False) -> None:
    """List the workloads that ship with plywise: what each is, its length, its target.

    Args:
        json: print them as JSON.
    """
    from plywise.arena.workloads import HIDDEN, QUICK, WORKLOADS, find_workload

    if json:
        found = [find_workload(name) for name in WORKLOADS]
        print_json(
            [
                {
                    **{key: getattr(one, key) for key in ("name", "about", "steps", "batch_size", "target")},
                    **{"metric": one.task.metric_name, "classes": one.classes, "quick": one.name in QUICK},
                }
                for one in found
            ]
        )
        return
    rows = table("workload", "what it is", "metric", "steps", "target", numbers=("steps", "target"))
    for name in WORKLOADS:
        one = find_workload(name)
        mark = f"{name} *" if name in QUICK else name
        rows.add_row(mark, one.about, one.task.metric_name, str(one.steps), number(one.target))
    screen = console()
    screen.print(rows)
    screen.print("* quick: needs no file and takes a second or two a run.")
    kinds = ", ".join(f"hidden-{kind}-N" for kind in HIDDEN)
    screen.print(
        f"A seed N makes more: {kinds}. `plywise bench --workloads hidden` takes a new seed. No default was "
        "tuned on these.",
        soft_wrap=True,
    )


@app.command
def fetch(name: str) -> None:
    """Download a public data set into the cache folder; every file is checked against its SHA-256.

    Args:
        name: mnist, fashion_mnist, cifar10, cifar100 or tinyshakespeare.
    """
    from plywise.data import store

    screen = console()
    for path in store.fetch(name):
        screen.print(f"{path}", soft_wrap=True)
