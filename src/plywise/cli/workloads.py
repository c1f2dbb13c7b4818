"""`plywise workloads`: lists the workloads of `plywise bench` and fetches their data."""

from typing import Any

from cyclopts import App

from plywise._util.tables import format_number
from plywise.cli.console import console, print_json, table
from plywise.cli.training import Switch

app = App(
    name="workloads",
    help="List the workloads of `plywise bench`; `plywise workloads fetch NAME` downloads their data.",
)


@app.default
def workloads(*, json: Switch = False) -> None:
    """List the workloads that ship with plywise: what each is, its length, its target.

    Args:
        json: print them as JSON. Where ``seeded`` is true, a seed goes in place of the N in the name, and
            decides what is null here.
    """
    from plywise.arena.workloads import HIDDEN, QUICK, WORKLOADS, find_workload

    if json:
        print_json([*map(_describe, WORKLOADS), *map(_describe_kind, HIDDEN)])
        return
    rows = table("workload", "what it is", "metric", "steps", "target", numbers=("steps", "target"))
    for name in WORKLOADS:
        one = find_workload(name)
        mark = f"{name} *" if name in QUICK else name
        rows.add_row(mark, one.about, one.task.metric_name, str(one.steps), format_number(one.target))
    screen = console()
    screen.print(rows)
    screen.print("* quick: needs no file and takes a second or two a run.")
    kinds = ", ".join(f"hidden-{kind}-N" for kind in HIDDEN)
    screen.print(
        f"A seed N makes more: {kinds}. `plywise bench --workloads hidden` takes a new seed. No default was "
        "tuned on these."
    )


def _describe(name: str) -> dict[str, Any]:
    from plywise.arena.workloads import QUICK, find_workload

    one = find_workload(name)
    return {
        **{key: getattr(one, key) for key in ("name", "about", "steps", "batch_size", "target")},
        **{"metric": one.task.metric_name, "classes": one.classes},
        **{"quick": one.name in QUICK, "seeded": False},
    }


def _describe_kind(kind: str) -> dict[str, Any]:
    """Describe the workloads of a hidden kind for machines, by what is the same for all seeds."""
    any_seed = dict.fromkeys(("steps", "batch_size", "target", "classes"))
    return {**_describe(f"hidden-{kind}-0"), "name": f"hidden-{kind}-N", **any_seed, "seeded": True}


@app.command
def fetch(name: str) -> None:
    """Download a public data set into the cache folder; every file is checked against its SHA-256.

    Args:
        name: mnist, fashion_mnist, cifar10, cifar100 or tinyshakespeare.
    """
    from plywise.data import store

    screen = console()
    for path in store.fetch(name):
        screen.print(f"{path}")
