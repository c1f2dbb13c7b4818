"""Print the tables on the pipeline of two processes from the figures of `pipeline.py` and `bridges.py`."""

from collections.abc import Callable
from typing import Any

from figure_tables import format_spread, format_table, read_figures


def write_pipeline(_: str) -> str:
    """Write the results of a pipeline of two processes, by kind of bridge."""
    bridges = read_figures("pipeline")["bridges"]
    over = "pipeline_over"
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "κ: AL's time over backprop's, one process each": lambda result: f"{result['kappa']:.2f}",
        "null control (backprop twice)": lambda result: f"{result['null_control']:.2f}",
        "pipeline over AL in one process": lambda result: f"{result[over]['AL, one process']:.2f}",
        "… of the ideal 2": lambda result: f"{result[over]['AL, one process'] / 2:.2f}",
        "… of two learners apart, what the machine gives two processes": lambda result: (
            f"{result['of_ceiling']:.2f}"
        ),
        "pipeline over torch's 1F1B": lambda result: f"{result[over]['backprop, 1F1B']:.2f}",
        "pipeline over torch's GPipe": lambda result: f"{result[over]['backprop, GPipe']:.2f}",
        "pipeline over backprop in one process": lambda result: (
            f"{result[over]['backprop, one process']:.2f}"
        ),
        "pipeline over DDP (its own batch of 256 in each process)": lambda result: (
            f"{result[over]['backprop, DDP']:.2f}"
        ),
        "bubble, measured / forecast": lambda result: (
            f"{result['bubble']:.2f} / {result['forecast']['bubble_of_two_stages']:.2f}"
        ),
        "speed-up, measured / forecast": lambda result: (
            f"{result[over]['AL, one process']:.2f} / {result['forecast']['speed_up_of_two_stages']:.2f}"
        ),
    }
    return format_table(
        ["", *bridges],
        [[name, *(show(result) for result in bridges.values())] for name, show in lines.items()],
    )


def write_pipeline_schedules(_: str) -> str:
    """Write the samples per second of torch's schedules for pipelines of backpropagation."""
    figures = read_figures("pipeline")["schedules"]
    rows = [
        [name, str(rate), f"{figures['over_1f1b'][name]:.2f}"]
        for name, rate in figures["samples_per_second"].items()
    ]
    return format_table(["", "samples a second", "of 1F1B's, round by round"], rows)


def write_pipeline_tokens(_: str) -> str:
    """Write the samples per second of local next token in two stages, and of what it is compared with."""
    figures = read_figures("pipeline")["tokens"]
    over = {name: f"{ratio:.2f}" for name, ratio in figures["pipeline_over"].items()}
    rows = [[name, f"{rate:.3g}", over.get(name, "")] for name, rate in figures["samples_per_second"].items()]
    return format_table(["", "samples a second", "pipeline over it, round by round"], rows)


def write_bridges(_: str) -> str:
    """Write the accuracy with the bridges of the pipeline."""
    data = [read_figures("bridges")["data"][name] for name in ("mnist", "fashion_mnist")]
    arms = data[0]
    rows = [
        [arm, *(format_spread([result["test"] for result in part[arm]["final"]]) for part in data)]
        for arm in arms
    ]
    return format_table(["", "MNIST, %", "Fashion-MNIST, %"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "pipeline": write_pipeline,
    "pipeline-schedules": write_pipeline_schedules,
    "pipeline-tokens": write_pipeline_tokens,
    "bridges": write_bridges,
}
"""The tables by their name in the page."""
