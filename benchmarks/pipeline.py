"""Compare the throughput of Associated Learning as a pipeline of two processes with other methods.

    python benchmarks/pipeline.py                   # writes benchmarks/pipeline.json and pipeline.svg
    python benchmarks/pipeline.py --schedules       # only torch's schedules, with zero bubble
    python benchmarks/pipeline.py --tokens          # only local next token on a transformer

The network has 784 inputs, 4 hidden layers of 1024 and 10 outputs, with batch 256, Adam, one thread per
process, and gloo. All arms take turns in one run of two processes, in shuffled order. The figures are samples
per second of whole runs of batches, including filling and draining, as medians over the rounds. An arm of one
process runs in the first process while the second one sleeps.

- "AL": the learner's four components, in one process or two stages, with each of several bridges; and two
  independent learners, one per process, as a measure of the speed that the machine has for two processes;
- "backprop": the network that AL predicts with (blocks, last bridge, decoders), in one process, with DDP and
  a batch of 256 per process, and with torch's GPipe and 1F1B with 4 micro-batches.

"--schedules" compares GPipe, 1F1B and the two zero-bubble schedules, which have two smaller stages in each
process: interleaved (0 and 2 in the first) and V (0 and 3). Their gradients are first compared with those of
one process.

"--tokens" compares local next token in two stages with the same methods: a transformer of four blocks, 256
wide, on 16 × 128 characters.

κ is AL's time over backprop's, both in one process. The discrete-event model (`benchmarks/forecast.py`) gets
the measured times of the stages. Its forecast for two stages is stored next to the measured figures; it also
forecasts 2 to 64 stages of one component each over several links.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from forecast import Link, StageCost, forecast
from local_memory import TOKEN_BATCH
from pictures import save_picture
from pipeline_arms import (
    AL,
    ARMS,
    BATCH,
    BATCHES,
    BRIDGES,
    LAYERS,
    NEXT_TOKEN,
    SCHEDULE_ARMS,
    TOKEN_ARMS,
    TOKENS,
    WIDTH,
    draw_batches,
    make_image_problem,
    make_learner,
    run_pair,
)
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.reports.bench_charts import thin

ROUNDS = 7
OUT = Path(__file__).with_suffix(".json")


def measure_components(bridge: str) -> list[StageCost]:
    """Measure each component in one process: median seconds of forward and of the rest, bytes to send."""
    learner = make_learner(bridge)
    clocks: list[list[tuple[float, float]]] = [[] for _ in learner.trainers]
    for x, y in draw_batches(BATCHES):
        signal = learner.signal(x, y)
        for trainer, entry in zip(learner.trainers, clocks, strict=True):
            sent: list[float] = []
            start = time.perf_counter()
            signal, _ = trainer.learn(signal, 0, lambda _, s=sent: s.append(time.perf_counter()))
            entry.append((sent[0] - start, time.perf_counter() - sent[0]))
    payload = 4 * BATCH * WIDTH
    return [
        StageCost(statistics.median(f for f, _ in entry), statistics.median(r for _, r in entry), payload)
        for entry in clocks
    ]


def combine_components(costs: list[StageCost]) -> StageCost:
    """Combine the components of a stage: all work except the last one's rest precedes the signal."""
    forward = sum(cost.forward + cost.rest for cost in costs[:-1]) + costs[-1].forward
    return StageCost(forward, costs[-1].rest, costs[-1].payload)


LINKS = {
    "no delay": Link(),
    "10 Gbit/s, 0.1 ms": Link(10e9 / 8, 1e-4),
    "1 Gbit/s, 1 ms": Link(1e9 / 8, 1e-3),
    "1 Gbit/s, 20 ms": Link(1e9 / 8, 2e-2),
}


def compare_arms(learner: str, pair: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Summarise a run of all arms over this many samples: rates, ratios within rounds, the bubble."""
    seconds = pair[0]["seconds"]
    alone, together, apart = (
        f"{learner}, {how}" for how in ("one process", "pipeline", "two learners apart (ceiling)")
    )

    def ratio(name: str, other: str) -> float:
        return statistics.median(o / n for n, o in zip(seconds[name], seconds[other], strict=True))

    start = min(span[0] for entry in pair for span in entry["spans"])
    end = max(span[1] for entry in pair for span in entry["spans"])
    busy = sum(b - a for entry in pair for a, b in entry["spans"])
    return {
        "samples_per_second": {
            name: float(f"{samples / statistics.median(entry):.4g}") for name, entry in seconds.items()
        },
        "kappa": 1 / ratio(alone, "backprop, one process"),
        "null_control": ratio("backprop again (null control)", "backprop, one process"),
        "pipeline_over": {name: round(ratio(together, name), 3) for name in seconds if name != together},
        "of_ideal": round(ratio(together, alone) / 2, 3),
        "of_ceiling": round(ratio(together, apart), 3),
        "bubble": round(1 - busy / (2 * (end - start)), 3),
        "spans": [[(a - start, b - start) for a, b in entry["spans"]] for entry in pair],
        "seconds": seconds,
    }


def forecast_stages(bridge: str) -> dict[str, Any]:
    """Forecast speed-ups from the components' times, measured alone in one process."""
    costs = measure_components(bridge)
    half = LAYERS // 2
    two = forecast([combine_components(costs[:half]), combine_components(costs[half:])], BATCHES)
    single = BATCHES * sum(cost.forward + cost.rest for cost in costs)
    inner = costs[1]  # every stage has this one component
    return {
        "forecast": {
            "speed_up_of_two_stages": round(single / two.seconds, 3),
            "bubble_of_two_stages": round(two.bubble, 3),
            "speed_up_by_link_and_stages": {
                name: {
                    stages: round(stages * 1000 * (inner.forward + inner.rest) / seconds, 2)
                    for stages in (2, 4, 8, 16, 32, 64)
                    if (seconds := forecast([inner] * stages, 1000, link).seconds)
                }
                for name, link in LINKS.items()
            },
        },
        "component_ms": [(round(1e3 * c.forward, 3), round(1e3 * c.rest, 3)) for c in costs],
    }


def compare_on_tokens(rounds: int) -> dict[str, Any]:
    """Compare local next token in two stages with the other methods, in samples of 128 characters."""
    part = compare_arms(NEXT_TOKEN, run_pair(TOKEN_ARMS, TOKENS, rounds), TOKEN_BATCH * TOKENS.batches)
    print_arms("local next token", part)
    return {"environment": environment(), **part}


def print_arms(title: str, part: dict[str, Any]) -> None:
    print(f"\n{title}: κ {part['kappa']:.2f}, null control {part['null_control']:.2f}, ", end="")
    print(f"{part['of_ceiling']:.2f} of ceiling, {part['of_ideal']:.2f} of ideal, ", end="")
    print(f"bubble {part['bubble']:.3f}, forecast {part.get('forecast', 'none')}")
    for name, rate in part["samples_per_second"].items():
        ratio = part["pipeline_over"].get(name, 1)
        print(f"  {name:40} {rate:7.4g} samples/s   pipeline is {ratio:.2f} ×", flush=True)


def compare_schedules(rounds: int) -> dict[str, Any]:
    """Measure samples per second of torch's schedules, and their speed over 1F1B's within rounds."""
    seconds = run_pair(SCHEDULE_ARMS, make_image_problem("one layer, code 64"), rounds)[0]["seconds"]
    rates = {name: round(BATCH * BATCHES / statistics.median(entry)) for name, entry in seconds.items()}
    plain = seconds["backprop, 1F1B"]
    over = {
        name: round(statistics.median(p / o for p, o in zip(plain, entry, strict=True)), 3)
        for name, entry in seconds.items()
    }
    for name, rate in rates.items():
        print(f"  {name:36} {rate:7} samples/s   {over[name]:.2f} × 1F1B", flush=True)
    return {"environment": environment(), "samples_per_second": rates, "over_1f1b": over, "seconds": seconds}


def draw(result: dict[str, Any]) -> None:
    """Draw the rates of the arms, and a Gantt chart of one run of the pipeline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, gantt) = plt.subplots(2, 1, figsize=(11, 8), height_ratios=(3, 1))
    names = list(ARMS)
    for place, (bridge, part) in enumerate(result["bridges"].items()):
        rates = [part["samples_per_second"][name] for name in names]
        positions = [i + (place - 1.5) * 0.2 for i in range(len(names))]
        bars.bar(positions, rates, 0.18, label=f"{bridge} (κ {part['kappa']:.2f})")
    bars.set_xticks(
        range(len(names)), [name.replace(", ", ",\n").replace(" (", "\n(") for name in names], fontsize=8
    )
    bars.set_ylabel("samples a second")
    bars.grid(axis="y", alpha=0.3)
    bars.legend(fontsize=8)
    bridge, part = next(iter(result["bridges"].items()))
    for stage, entry in enumerate(part["spans"]):
        for number, (start, end) in enumerate(entry):
            colour = plt.cm.viridis(number / len(entry))
            gantt.broken_barh([(1e3 * start, 1e3 * (end - start))], (1 - stage - 0.4, 0.8), color=colour)
    gantt.set_yticks([1, 0], ["stage 0", "stage 1"])
    gantt.set_xlabel(f"milliseconds; {BATCHES} batches, {bridge}, bubble {100 * part['bubble']:.0f} %")
    figure.tight_layout()
    save_picture(figure, OUT.with_suffix(".svg"))


def write(result: dict[str, Any]) -> None:
    write_whole(OUT, json.dumps(thin(result, 5)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--bridge", action="append", choices=list(BRIDGES), help="default: all")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--schedules", action="store_true", help="run only torch's schedules")
    only.add_argument("--tokens", action="store_true", help="run only local next token")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"bridges": {}}
    if options.schedules or options.tokens:
        name, compare = (
            ("schedules", compare_schedules) if options.schedules else ("tokens", compare_on_tokens)
        )
        result[name] = compare(options.rounds)
        write(result)
        return
    result["environment"] = environment()
    for bridge in options.bridge or list(BRIDGES):
        pair = run_pair(ARMS, make_image_problem(bridge), options.rounds)
        part = compare_arms(AL, pair, BATCH * BATCHES) | forecast_stages(bridge)
        result["bridges"][bridge] = part
        print_arms(bridge, part)
        write(result)
    draw(result)


if __name__ == "__main__":
    main()
