"""Print the tables of benchmarks/README.md from the figures of the benchmarks (see `tables.py`)."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEVER = "never"


def read_figures(name: str) -> Any:
    """Read the figures of a benchmark."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def format_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


def format_spread(values: list[float], digits: int = 1) -> str:
    """Format the mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def format_loss(value: float) -> str:
    """Format a training loss with two or three digits."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def make_step_cost_writer(figures: str, extra: str, show: str = "{:.2f}") -> Callable[[str], str]:
    """Return a function that writes the cost of a step on each network, with another figure in brackets."""

    def write(_: str) -> str:
        nets = read_figures(figures)["nets"]
        headings = [
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
        return format_table(["rule", *headings], rows)

    return write


def write_width_cost(_: str) -> str:
    """Write the cost of a mean step, and peak memory in brackets, over fused AdamW's, at each width."""
    nets = read_figures("width_cost")["nets"]
    widths = [*sorted((net for net in nets if net.isdigit()), key=int), "transformer"]
    rows = []
    for arm in dict.fromkeys(arm for net in widths for arm in nets[net]):
        found = [nets[net].get(arm) for net in widths]
        rows.append([arm, *(f"{row['cost']:.2f} ({row['memory']:.2f})" if row else "–" for row in found)])
    return format_table(["arm", *widths], rows)


def write_compile_cost(_: str) -> str:
    """Write the graphs, breaks and cost of compiled models with rules."""
    rows = [
        [net, name, f"{result['graphs']:.0f}", f"{result['breaks']:.0f}", f"{result['cpu']:.2f}"]
        for net, rules in read_figures("compile_cost")["nets"].items()
        for name, result in rules.items()
    ]
    return format_table(
        ["network", "rule", "graphs", "kinds of breaks", "CPU time, compiled over eager"], rows
    )


def write_coverage(_: str) -> str:
    """Write the coverage of each rule; rules with the same figures share a row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for result in read_figures("coverage")["summary"]:
        figures = (
            str(result["covered"]),
            f"{100 * result['mean_share']:.0f} %",
            str(result["refused"]),
            str(result["wrong"]),
        )
        groups.setdefault(figures, []).append(result["rule"])
    head = ["rules", "families with 95 % of the parameters handled", "mean share", "refused", "wrong"]
    rows = [
        [", ".join(rules).replace("Amplification", 'Amplification, mode "signal"'), *figures]
        for figures, rules in groups.items()
    ]
    return format_table(head, rows)


def write_memory_rules(_: str) -> str:
    """Write steps and CPU seconds to AdamW's best validation loss, the lowest CPU time first."""
    fashion, cifar = (read_figures("memory_rules")[name]["methods"] for name in ("fashion", "cifar"))

    def cells(row: dict[str, Any]) -> list[str]:
        steps, seconds = row["steps_to_target"], row["cpu_seconds_to_target"]
        reached = f"{steps:g} / {seconds:.2f}" if steps is not None else f"{NEVER} / {NEVER}"
        return [reached, f"{row['best_validation_loss']:.3f}", f"{row['rate']:.3g}"]

    def compute_order(name: str) -> float:
        both = [part[name]["cpu_seconds_to_target"] for part in (fashion, cifar)]
        return math.prod(1e3 if seconds is None else seconds for seconds in both)

    head = ["method", "Fashion-MNIST: steps / CPU s", "best loss", "rate"]
    head += ["CIFAR-10: steps / CPU s", "best loss", "rate"]
    return format_table(
        head,
        [[name, *cells(fashion[name]), *cells(cifar[name])] for name in sorted(fashion, key=compute_order)],
    )


def make_fewer_steps_writer(name: str) -> Callable[[str], str]:
    """Return a function that writes the steps to AdamW's final training loss on one data set."""

    def write(_: str) -> str:
        rows = []
        for method, row in read_figures("fewer_steps")["sets"][name]["methods"].items():
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
        return format_table(head, rows)

    return write


def write_bad_scaling(_: str) -> str:
    """Write the final training loss and test accuracy of each method on each network."""
    networks = read_figures("bad_scaling")["networks"]

    def format_cell(row: dict[str, Any]) -> str:
        return (
            f"{format_loss(row['median_final_loss'])} ({100 * statistics.median(row['test_accuracy']):.0f})"
        )

    methods = next(iter(networks.values()))
    return format_table(
        ["method", *networks],
        [[name, *(format_cell(net[name]) for net in networks.values())] for name in methods],
    )


def make_local_learning_writer(name: str) -> Callable[[str], str]:
    """Return a function that writes the accuracies of all methods on one workload."""

    def write(_: str) -> str:
        rows = []
        for method, entry in sorted(
            read_figures("local_learning")["workloads"][name].items(), key=lambda result: result[0].casefold()
        ):
            final, depths = entry["final"], ""
            if "depths" in final[0]:
                columns = zip(*(result["depths"] for result in final), strict=True)
                depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            test, training = (format_spread([result[key] for result in final]) for key in ("test", "train"))
            seconds = statistics.median(result["cpu"] for result in final)
            rows.append([method, f"{final[0]['rate']:g}", test, training, depths, f"{seconds:.0f}"])
        return format_table(
            ["method", "rate", "test accuracy, %", "training accuracy, %", "by depth", "CPU s"], rows
        )

    return write


def make_local_table_writer(name: str) -> Callable[[str], str]:
    """Return a function that writes quality, memory and speed on one workload, the best method first.

    A speed is approximate (≈) if the entry did not measure backpropagation in the same process.
    """

    def write(_: str) -> str:
        entries = read_figures("local_table")["workloads"][name]
        plain = entries["backpropagation"]["final"]
        tokens, bytes_of_plain = name == "characters", plain[0]["alive_bytes"]
        rows = []
        for method, entry in sorted(
            entries.items(), key=lambda result: compute_quality(result[1]), reverse=not tokens
        ):
            final = entry["final"]
            test = format_spread([result["test"] for result in final], digits=3 if tokens else 1)
            share = final[0]["alive_bytes"] / bytes_of_plain
            rows.append([method, f"{final[0]['rate']:g}", test, f"{share:.2f}", format_speed(final, plain)])
        unit = "test loss, nats a character" if tokens else "test accuracy, %"
        return format_table(["method", "rate", unit, "memory", "speed"], rows)

    def format_speed(final: list[dict[str, float]], plain: list[dict[str, float]]) -> str:
        """Format samples per second over backpropagation's, from the same process or from its own entry."""
        reference = "backpropagation_samples_a_second"
        if reference in final[0]:
            ratios = [result["samples_a_second"] / result[reference] for result in final]
            return f"{statistics.median(ratios):.2f}"
        fast, usual = (
            statistics.median(result["samples_a_second"] for result in runs) for runs in (final, plain)
        )
        return f"≈ {fast / usual:.1f}"

    def compute_quality(entry: dict[str, Any]) -> float:
        return statistics.fmean(result["test"] for result in entry["final"])

    return write


def write_associated_text(_: str) -> str:
    """Write the results of Associated Learning and of backpropagation on film reviews."""
    rows = []
    for network, methods in read_figures("associated_text")["networks"].items():
        for method, entry in methods.items():
            columns = list(zip(*entry["test"], strict=True))
            depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            score = format_spread([result[-1] for result in entry["test"]])
            rows.append([network, method, f"{entry['rate']:g}", score, depths if len(columns) > 1 else ""])
    return format_table(["network", "method", "rate", "test accuracy, %", "by depth"], rows)


def make_local_memory_writer(network: str) -> Callable[[str], str]:
    """Return a function that writes peak memory and time of the methods on one network."""

    def write(_: str) -> str:
        methods = read_figures("local_memory")[network]["ways"]
        plain = methods["backpropagation"]["peak_mib"]
        rows = []
        for method, row in methods.items():
            peak, seconds = row["peak_mib"], row["cpu_us_per_sample"]
            rows.append([method, f"{peak:.1f}", f"{peak / plain:.2f}", f"{seconds:.0f}"])
        return format_table(["way", "peak, MiB", "of backprop", "CPU µs a sample"], rows)

    return write


def write_local_growth(_: str) -> str:
    """Write the memory of a step by depth and width, and the relative CPU time of the largest networks."""
    figures = read_figures("local_growth")
    rows = []
    for method in figures["depth"]["8"]:
        cells = []
        for axis in ("depth", "width"):
            sizes = [result[method] for result in figures[axis].values()]
            plain = [result["backpropagation"]["cpu_seconds"] for result in figures[axis].values()]
            cells.append(" / ".join(f"{result['bytes'] / 2**20:.1f}" for result in sizes))
            cells.append(f"{sizes[-1]['cpu_seconds'] / plain[-1]:.1f}")
        rows.append([method, *cells])
    depths, widths = (" / ".join(figures[axis]) for axis in ("depth", "width"))
    head = ["", f"MiB at {depths} blocks", "CPU time at the deepest", f"MiB at widths {widths}"]
    return format_table([*head, "CPU time at the widest"], rows)


def write_denoising(_: str) -> str:
    """Write the PSNR of each denoiser at each noise level."""
    names = {"noisy": "the noisy image", "blur": "Gaussian blur", "TV": "total variation"}
    figures = read_figures("denoising")["psnr_db"]
    levels = [f"noise {level}" if place == 0 else level for place, level in enumerate(figures["noisy"])]
    rows = [
        [names.get(name, name), *(f"{value:.2f}" for value in row.values())] for name, row in figures.items()
    ]
    return format_table(["", *levels], rows)


def write_decision_stage(_: str) -> str:
    """Write the time to the target over that of the network: median, lowest and highest seed."""
    methods = ("support vector machine", "logistic regression")
    rows = []
    for name, result in read_figures("decision_stage")["workloads"].items():
        cells = []
        for method in methods:
            seeds = result["ways"][method]["of_network_by_seed"]
            cells.append(f"{result['ways'][method]['of_network']:.2f} ({min(seeds):.2f} to {max(seeds):.2f})")
        rows.append([f"{name.split(',')[0]}, {result['settings']}", *cells])
    return format_table(["", *methods], rows)


def write_physics_informed(_: str) -> str:
    """Write the errors of physics-informed networks (median, lowest and highest seed) and the paper's."""
    problems = read_figures("physics_informed")["problems"]
    rows = []
    for kind, poisson in problems["poisson"]["kinds"].items():
        burgers = problems["burgers"]["kinds"][kind]
        cells = [
            f"{result['median']:.3f} [{min(result['final_error']):.3f}, {max(result['final_error']):.3f}]"
            for result in (poisson, burgers)
        ]
        papers = ["" if result["paper"] is None else f"{result['paper']:,}" for result in (poisson, burgers)]
        first = [NEVER if result is None else str(result) for result in burgers["iterations_to_level"]]
        rows.append([KINDS[kind], cells[0], papers[0], cells[1], ", ".join(first), papers[1]])
    head = ["", "Poisson, error of the coefficient, 4,000 iterations", "the paper's"]
    head += [
        "Burgers, error of the solution, 8,000 iterations",
        "first below 0.2 after, by seed",
        "the paper's iterations",
    ]
    return format_table(head, rows)


KINDS = {
    "fixed": "fixed tanh",
    "global": "GAAF",
    "layer": "L-LAAF, slope recovery",
    "neuron": "N-LAAF, slope recovery",
    "layer-alone": "L-LAAF without it",
}
"""Names of the kinds of adaptive activations in the page."""


def make_comparison_writer(figures: str, first: str) -> Callable[[str], str]:
    """Return a function that writes the losses of arms on small sets, and mean ratios to the first arm."""

    def write(_: str) -> str:
        found = read_figures(figures)
        sets = list(found["arms"][first])
        rows = [
            [
                name,
                *(
                    f"{format_loss(row[result]['training'])} / {format_loss(row[result]['validation'])}"
                    for result in sets
                ),
            ]
            + [f"{found['ratios'][name][key]:.2f}" for key in ("training", "validation", "cpu")]
            for name, row in found["arms"].items()
        ]
        return format_table(["arm", *sets, "training", "validation", "CPU time"], rows)

    return write


TABLES: dict[str, Callable[[str], str]] = {
    "recommended-defaults": make_comparison_writer("recommended_defaults", "defaults"),
    "recommended-parts": make_comparison_writer("recommended_parts", "recommended"),
    "tried-ideas": make_comparison_writer("tried_ideas", "AdamW in coordinates"),
    "compile-cost": write_compile_cost,
    "coverage": write_coverage,
    "step-cost-1-thread": make_step_cost_writer("step_cost_1_thread", "memory"),
    "step-cost-2-threads": make_step_cost_writer("step_cost_2_threads", "memory"),
    "width-cost": write_width_cost,
    "cycle-cost": make_step_cost_writer("cycle_cost", "slowest_step", "{:.1f}"),
    "memory-rules": write_memory_rules,
    **{f"fewer-steps-{name}": make_fewer_steps_writer(name) for name in ("digits", "mnist")},
    "bad-scaling": write_bad_scaling,
    **{
        f"local-learning-{name}": make_local_learning_writer(name)
        for name in ("mnist-mlp", "fashion-mlp", "mnist-cnn", "fashion-cnn", "cifar-vgg")
    },
    **{
        f"local-table-{name}": make_local_table_writer(name)
        for name in ("cifar", "mnist", "fashion", "characters")
    },
    **{f"local-memory-{name}": make_local_memory_writer(name) for name in ("blocks", "transformer")},
    "local-growth": write_local_growth,
    "associated-text": write_associated_text,
    "denoising": write_denoising,
    "decision-stage": write_decision_stage,
    "physics-informed": write_physics_informed,
}
"""The tables by their name in the page."""
