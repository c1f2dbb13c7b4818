"""The tables of README.md beside this file, printed from the figures of the benchmarks (see `tables.py`)."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEVER = "never"


def read(name: str) -> Any:
    """The figures of a benchmark."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def loss(value: float) -> str:
    """A training loss with two or three digits."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def step_cost(figures: str, extra: str, show: str = "{:.2f}") -> Callable[[str], str]:
    """The cost of a step on each network, and another figure in brackets."""

    def write(_: str) -> str:
        nets = read(figures)["nets"]
        heads = [
            name.removeprefix("784-1024-1024-10, ") if extra == "slowest_step" else name for name in nets
        ]
        rows = []
        for name in next(iter(nets.values())):
            cells = []
            for net in nets.values():
                row = net.get(name)
                more = f" ({show.format(row[extra])})" if row and extra in row else ""
                cells.append(f"{row['cpu']:.2f}{more}" if row else "–")
            rows.append([name, *cells])
        return table(["rule", *heads], rows)

    return write


def width_cost(_: str) -> str:
    """The cost of a mean step of a cycle at each width, and peak memory in brackets, over fused AdamW's."""
    nets = read("width_cost")["nets"]
    widths = [*sorted((net for net in nets if net.isdigit()), key=int), "transformer"]
    rows = []
    for arm in dict.fromkeys(arm for net in widths for arm in nets[net]):
        found = [nets[net].get(arm) for net in widths]
        rows.append([arm, *(f"{row['cost']:.2f} ({row['memory']:.2f})" if row else "–" for row in found)])
    return table(["arm", *widths], rows)


def compile_cost(_: str) -> str:
    """What torch.compile makes of models with rules."""
    rows = [
        [net, name, f"{one['graphs']:.0f}", f"{one['breaks']:.0f}", f"{one['cpu']:.2f}"]
        for net, rules in read("compile_cost")["nets"].items()
        for name, one in rules.items()
    ]
    return table(["network", "rule", "graphs", "kinds of breaks", "CPU time, compiled over eager"], rows)


def coverage(_: str) -> str:
    """Rules with the same figures share a row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in read("coverage")["summary"]:
        figures = (
            str(one["covered"]),
            f"{100 * one['mean_share']:.0f} %",
            str(one["refused"]),
            str(one["wrong"]),
        )
        groups.setdefault(figures, []).append(one["rule"])
    head = ["rules", "families with 95 % of the parameters handled", "mean share", "refused", "wrong"]
    rows = [
        [", ".join(rules).replace("Amplification", 'Amplification, mode "signal"'), *figures]
        for figures, rules in groups.items()
    ]
    return table(head, rows)


def memory_rules(_: str) -> str:
    """Steps and CPU seconds to AdamW's best validation loss, the least CPU time first."""
    fashion, cifar = (read("memory_rules")[name]["methods"] for name in ("fashion", "cifar"))

    def cells(row: dict[str, Any]) -> list[str]:
        steps, seconds = row["steps_to_target"], row["cpu_seconds_to_target"]
        reached = f"{steps:g} / {seconds:.2f}" if steps is not None else f"{NEVER} / {NEVER}"
        return [reached, f"{row['best_validation_loss']:.3f}", f"{row['rate']:.3g}"]

    def order(name: str) -> float:
        both = [part[name]["cpu_seconds_to_target"] for part in (fashion, cifar)]
        return math.prod(1e3 if seconds is None else seconds for seconds in both)

    head = ["method", "Fashion-MNIST: steps / CPU s", "best loss", "rate"]
    head += ["CIFAR-10: steps / CPU s", "best loss", "rate"]
    return table(
        head, [[name, *cells(fashion[name]), *cells(cifar[name])] for name in sorted(fashion, key=order)]
    )


def fewer_steps(name: str) -> Callable[[str], str]:
    """Steps to AdamW's final training loss on one data set."""

    def write(_: str) -> str:
        rows = []
        for method, row in read("fewer_steps")["sets"][name]["methods"].items():
            steps, seconds = row["median_steps_to_target"], row["median_cpu_seconds_to_target"]
            reached = ["not reached", "–"] if steps is None else [f"{steps:g}", f"{seconds:.3g}"]
            final = f"{statistics.median(row['final_loss']):.2g}"
            accuracy = f"{100 * statistics.median(row['test_accuracy']):.1f}"
            rows.append([method, f"`{row['settings']}`", *reached, final, accuracy])
        head = [
            "method",
            "settings",
            "steps to target",
            "CPU s to target",
            "final training loss",
            "test accuracy, %",
        ]
        return table(head, rows)

    return write


def bad_scaling(_: str) -> str:
    """Final training loss and test accuracy of each method on each network."""
    networks = read("bad_scaling")["networks"]

    def cell(row: dict[str, Any]) -> str:
        return f"{loss(row['median_final_loss'])} ({100 * statistics.median(row['test_accuracy']):.0f})"

    methods = next(iter(networks.values()))
    return table(
        ["method", *networks], [[name, *(cell(net[name]) for net in networks.values())] for name in methods]
    )


def local_learning(name: str) -> Callable[[str], str]:
    """Accuracies of all methods on one workload."""

    def write(_: str) -> str:
        rows = []
        for method, entry in sorted(
            read("local_learning")["workloads"][name].items(), key=lambda one: one[0].casefold()
        ):
            final, depths = entry["final"], ""
            if "depths" in final[0]:
                columns = zip(*(one["depths"] for one in final), strict=True)
                depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            test, training = (spread([one[key] for one in final]) for key in ("test", "train"))
            seconds = statistics.median(one["cpu"] for one in final)
            rows.append([method, f"{final[0]['rate']:g}", test, training, depths, f"{seconds:.0f}"])
        return table(
            ["method", "rate", "test accuracy, %", "training accuracy, %", "by depth", "CPU s"], rows
        )

    return write


def local_table(name: str) -> Callable[[str], str]:
    """Quality, memory and speed of what has been run on one workload, the best first.

    An approximate speed (≈) is that of an entry which did not measure backpropagation beside itself.
    """

    def write(_: str) -> str:
        entries = read("local_table")["workloads"][name]
        plain = entries["backpropagation"]["final"]
        tokens, bytes_of_plain = name == "characters", plain[0]["alive_bytes"]
        rows = []
        for method, entry in sorted(entries.items(), key=lambda one: quality(one[1]), reverse=not tokens):
            final = entry["final"]
            test = spread([one["test"] for one in final], digits=3 if tokens else 1)
            share = final[0]["alive_bytes"] / bytes_of_plain
            rows.append([method, f"{final[0]['rate']:g}", test, f"{share:.2f}", speed(final, plain)])
        unit = "test loss, nats a character" if tokens else "test accuracy, %"
        return table(["method", "rate", unit, "memory", "speed"], rows)

    def speed(final: list[dict[str, float]], plain: list[dict[str, float]]) -> str:
        """Samples a second over backpropagation's: beside the run, else of the entry of backpropagation."""
        beside = "backpropagation_samples_a_second"
        if beside in final[0]:
            return f"{statistics.median(one['samples_a_second'] / one[beside] for one in final):.2f}"
        fast, usual = (statistics.median(one["samples_a_second"] for one in runs) for runs in (final, plain))
        return f"≈ {fast / usual:.1f}"

    def quality(entry: dict[str, Any]) -> float:
        return statistics.fmean(one["test"] for one in entry["final"])

    return write


def associated_text(_: str) -> str:
    """Associated Learning on reviews of films beside backpropagation of the same network."""
    rows = []
    for network, ways in read("associated_text")["networks"].items():
        for way, entry in ways.items():
            columns = list(zip(*entry["test"], strict=True))
            depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            score = spread([one[-1] for one in entry["test"]])
            rows.append([network, way, f"{entry['rate']:g}", score, depths if len(columns) > 1 else ""])
    return table(["network", "way", "rate", "test accuracy, %", "by depth"], rows)


def local_memory(network: str) -> Callable[[str], str]:
    """Peak memory and time of ways to train a network."""

    def write(_: str) -> str:
        ways = read("local_memory")[network]["ways"]
        plain = ways["backpropagation"]["peak_mib"]
        rows = []
        for way, row in ways.items():
            peak, seconds = row["peak_mib"], row["cpu_us_per_sample"]
            rows.append([way, f"{peak:.1f}", f"{peak / plain:.2f}", f"{seconds:.0f}"])
        return table(["way", "peak, MiB", "of backprop", "CPU µs a sample"], rows)

    return write


def local_growth(_: str) -> str:
    """Memory of a step by depth and width, and CPU time over backpropagation's at the deepest and widest."""
    figures = read("local_growth")
    rows = []
    for method in figures["depth"]["8"]:
        cells = []
        for axis in ("depth", "width"):
            sizes = [one[method] for one in figures[axis].values()]
            plain = [one["backpropagation"]["cpu_seconds"] for one in figures[axis].values()]
            cells.append(" / ".join(f"{one['bytes'] / 2**20:.1f}" for one in sizes))
            cells.append(f"{sizes[-1]['cpu_seconds'] / plain[-1]:.1f}")
        rows.append([method, *cells])
    depths, widths = (" / ".join(figures[axis]) for axis in ("depth", "width"))
    head = ["", f"MiB at {depths} blocks", "CPU time at the deepest", f"MiB at widths {widths}"]
    return table([*head, "CPU time at the widest"], rows)


def pipeline(_: str) -> str:
    """What a pipeline of two processes reaches, by kind of bridge."""
    bridges = read("pipeline")["bridges"]
    over = "pipeline_over"
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "κ: AL's time over backprop's, one process each": lambda one: f"{one['kappa']:.2f}",
        "null control (backprop twice)": lambda one: f"{one['null_control']:.2f}",
        "pipeline over AL in one process": lambda one: f"{one[over]['AL, one process']:.2f}",
        "… of the ideal 2": lambda one: f"{one[over]['AL, one process'] / 2:.2f}",
        "… of two learners apart, what the machine gives two processes": lambda one: (
            f"{one['of_ceiling']:.2f}"
        ),
        "pipeline over torch's 1F1B": lambda one: f"{one[over]['backprop, 1F1B']:.2f}",
        "pipeline over torch's GPipe": lambda one: f"{one[over]['backprop, GPipe']:.2f}",
        "pipeline over backprop in one process": lambda one: f"{one[over]['backprop, one process']:.2f}",
        "pipeline over DDP (its own batch of 256 in each process)": lambda one: (
            f"{one[over]['backprop, DDP']:.2f}"
        ),
        "bubble, measured / forecast": lambda one: (
            f"{one['bubble']:.2f} / {one['forecast']['bubble_of_two_stages']:.2f}"
        ),
        "speed-up, measured / forecast": lambda one: (
            f"{one[over]['AL, one process']:.2f} / {one['forecast']['speed_up_of_two_stages']:.2f}"
        ),
    }
    return table(
        ["", *bridges], [[name, *(show(one) for one in bridges.values())] for name, show in lines.items()]
    )


def pipeline_schedules(_: str) -> str:
    """Samples a second of torch's schedules for pipelines of backpropagation."""
    figures = read("pipeline")["schedules"]
    rows = [
        [name, str(rate), f"{figures['over_1f1b'][name]:.2f}"]
        for name, rate in figures["samples_per_second"].items()
    ]
    return table(["", "samples a second", "of 1F1B's, round by round"], rows)


def bridges(_: str) -> str:
    """Accuracy with the bridges of the pipeline."""
    data = [read("bridges")["data"][name] for name in ("mnist", "fashion_mnist")]
    arms = data[0]
    rows = [[arm, *(spread([one["test"] for one in part[arm]["final"]]) for part in data)] for arm in arms]
    return table(["", "MNIST, %", "Fashion-MNIST, %"], rows)


def denoising(_: str) -> str:
    """PSNR of each denoiser at each level of noise."""
    names = {"noisy": "the noisy image", "blur": "Gaussian blur", "TV": "total variation"}
    figures = read("denoising")["psnr_db"]
    levels = [f"noise {level}" if place == 0 else level for place, level in enumerate(figures["noisy"])]
    rows = [
        [names.get(name, name), *(f"{value:.2f}" for value in row.values())] for name, row in figures.items()
    ]
    return table(["", *levels], rows)


def decision_stage(_: str) -> str:
    """CPU time until a classifier decides as well over that of the network: median, least and most."""
    ways = ("support vector machine", "logistic regression")
    rows = []
    for name, one in read("decision_stage")["workloads"].items():
        cells = []
        for way in ways:
            seeds = one["ways"][way]["of_network_by_seed"]
            cells.append(f"{one['ways'][way]['of_network']:.2f} ({min(seeds):.2f} to {max(seeds):.2f})")
        rows.append([f"{name.split(',')[0]}, {one['settings']}", *cells])
    return table(["", *ways], rows)


def physics_informed(_: str) -> str:
    """Errors of physics-informed networks: the median of the seeds, the least and the most; the paper's."""
    problems = read("physics_informed")["problems"]
    rows = []
    for kind, poisson in problems["poisson"]["kinds"].items():
        burgers = problems["burgers"]["kinds"][kind]
        cells = [
            f"{one['median']:.3f} [{min(one['final_error']):.3f}, {max(one['final_error']):.3f}]"
            for one in (poisson, burgers)
        ]
        papers = ["" if one["paper"] is None else f"{one['paper']:,}" for one in (poisson, burgers)]
        first = [NEVER if one is None else str(one) for one in burgers["iterations_to_level"]]
        rows.append([KINDS[kind], cells[0], papers[0], cells[1], ", ".join(first), papers[1]])
    head = ["", "Poisson, error of the coefficient, 4,000 iterations", "the paper's"]
    head += [
        "Burgers, error of the solution, 8,000 iterations",
        "first below 0.2 after, by seed",
        "the paper's iterations",
    ]
    return table(head, rows)


KINDS = {
    "fixed": "fixed tanh",
    "global": "GAAF",
    "layer": "L-LAAF, slope recovery",
    "neuron": "N-LAAF, slope recovery",
    "layer-alone": "L-LAAF without it",
}
"""Kinds of adaptive activations by the names of the page."""


def beside(figures: str, first: str) -> Callable[[str], str]:
    """Arms on small sets: the losses of each, and geometric means over the first arm's figures."""

    def write(_: str) -> str:
        found = read(figures)
        sets = list(found["arms"][first])
        rows = [
            [name, *(f"{loss(row[one]['training'])} / {loss(row[one]['validation'])}" for one in sets)]
            + [f"{found['ratios'][name][key]:.2f}" for key in ("training", "validation", "cpu")]
            for name, row in found["arms"].items()
        ]
        return table(["arm", *sets, "training", "validation", "CPU time"], rows)

    return write


TABLES: dict[str, Callable[[str], str]] = {
    "recommended-defaults": beside("recommended_defaults", "defaults"),
    "recommended-parts": beside("recommended_parts", "recommended"),
    "tried-ideas": beside("tried_ideas", "AdamW in coordinates"),
    "compile-cost": compile_cost,
    "coverage": coverage,
    "step-cost-1-thread": step_cost("step_cost_1_thread", "memory"),
    "step-cost-2-threads": step_cost("step_cost_2_threads", "memory"),
    "width-cost": width_cost,
    "cycle-cost": step_cost("cycle_cost", "slowest_step", "{:.1f}"),
    "memory-rules": memory_rules,
    **{f"fewer-steps-{name}": fewer_steps(name) for name in ("digits", "mnist")},
    "bad-scaling": bad_scaling,
    **{
        f"local-learning-{name}": local_learning(name)
        for name in ("mnist-mlp", "fashion-mlp", "mnist-cnn", "fashion-cnn", "cifar-vgg")
    },
    **{f"local-table-{name}": local_table(name) for name in ("cifar", "mnist", "fashion", "characters")},
    **{f"local-memory-{name}": local_memory(name) for name in ("blocks", "transformer")},
    "local-growth": local_growth,
    "pipeline": pipeline,
    "pipeline-schedules": pipeline_schedules,
    "bridges": bridges,
    "denoising": denoising,
    "decision-stage": decision_stage,
    "physics-informed": physics_informed,
}
"""By the name that stands in the page."""
