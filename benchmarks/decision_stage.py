"""Does a classifier on softmax vectors save training time? Decision stage against the largest probability.

    python benchmarks/decision_stage.py               # writes benchmarks/decision_stage.json

A small ConvNet trains to the end, and is looked at 12 times on its way. At each look two things decide: the
largest probability, and a `plywise.nn.DecisionStage` (a support vector machine or logistic regression of
scikit-learn) fitted on the softmax vectors of 1,000 training samples. The target is the network's own
validation accuracy at the end, the mean of its last three looks. The time of a look is the CPU time of the
training steps so far; the stage's has the one fit added that it would take there. Ratios are within a seed,
then medians over seeds; a target that is never reached counts as infinite, and the accuracy there as 0.
One thread.

The script has a loop of its own because two ways to decide look at the same training, with times of their
own, and each seed has other data: in the arena each way would train for itself, all seeds on one data set.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.data.digits import Split, load_digits
from plywise.data.sets import load_grey_images
from plywise.errors import PlywiseError
from plywise.nn import DecisionStage

SEEDS, LOOKS, BATCH, STAGE_SAMPLES = range(3), 12, 64, 1000
NETWORK = "largest probability"
HEADS = ("time/network", "time/whole", "accuracy there", "at the end")
STAGES: dict[str, Callable[[], Any]] = {
    "support vector machine": SVC,
    "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
}
Data = tuple[Split, Split, Split]
Optimizer = Callable[[Any], torch.optim.Optimizer]


def digits(seed: int) -> Data:
    return tuple(Split(part.x.reshape(-1, 1, 8, 8), part.y) for part in load_digits(seed))


def fashion(seed: int) -> Data:
    x, y, x_test, y_test = (torch.from_numpy(np.array(part)) for part in load_grey_images("fashion_mnist"))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = (
        (x[order[:3000]], y[order[:3000]]),
        (x[order[-1000:]], y[order[-1000:]]),
        (x_test[:1000], y_test[:1000]),
    )
    return tuple(Split(images[:, None].float() / 255, labels.long()) for images, labels in parts)


WORKLOADS: dict[str, tuple[Callable[[int], Data], int, Optimizer, str]] = {
    "digits, Adam": (digits, 20, lambda p: torch.optim.Adam(p, 1e-3), "Adam(1e-3), 20 epochs"),
    "digits, Adam at ten times the rate": (
        digits,
        20,
        lambda p: torch.optim.Adam(p, 1e-2),
        "Adam(1e-2), 20 epochs",
    ),
    "Fashion-MNIST, Adam": (
        fashion,
        4,
        lambda p: torch.optim.Adam(p, 1e-3),
        "Adam(1e-3), 4 epochs of 3,000 images",
    ),
}


def convnet(side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 10),
    )


def share_right(decided: Tensor, part: Split) -> float:
    return (decided == part.y).double().mean().item()


def look(model: nn.Module, data: Data, trained: float) -> dict[str, dict[str, float]]:
    """Seconds and accuracies of each way to decide, after ``trained`` seconds of training."""
    train, *held_out = data
    with torch.no_grad():
        right = [share_right(model(part.x).argmax(1), part) for part in held_out]
    ways = {NETWORK: {"seconds": trained, "validation": right[0], "test": right[1]}}
    for name, classifier in STAGES.items():
        start = time.process_time()
        stage = DecisionStage(model, classifier())
        stage.fit([(train.x[:STAGE_SAMPLES], train.y[:STAGE_SAMPLES])])
        seconds = trained + time.process_time() - start
        right = [share_right(stage.predict(part.x), part) for part in held_out]
        ways[name] = {"seconds": seconds, "validation": right[0], "test": right[1]}
    return ways


def run(workload: str, seed: int) -> list[dict[str, dict[str, float]]]:
    """Train once; what each look saw."""
    load, epochs, optimizer_of, _ = WORKLOADS[workload]
    data = load(seed)
    train = data[0]
    torch.manual_seed(seed)
    model = convnet(train.x.shape[-1])
    optimizer = optimizer_of(model.parameters())
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(train.y)).split(BATCH)]
    stops = {round((number + 1) * len(batches) / LOOKS) for number in range(LOOKS)}
    trained, looks = 0.0, []
    for number, rows in enumerate(batches, start=1):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
        trained += time.process_time() - start
        if number in stops:
            looks.append(look(model, data, trained))
    return looks


def reached(looks: list[dict[str, dict[str, float]]], way: str, target: float) -> dict[str, float] | None:
    return next((seen[way] for seen in looks if seen[way]["validation"] >= target), None)


def compared(runs: list[list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Medians over seeds: time to the target over the network's, and over the whole training's."""
    table = {}
    for way in [NETWORK, *STAGES]:
        rows = []
        for looks in runs:
            target = statistics.mean(seen[NETWORK]["validation"] for seen in looks[-3:])
            own, network = reached(looks, way, target), reached(looks, NETWORK, target)
            seconds = own["seconds"] if own else float("inf")
            rows.append(
                {
                    "of_network": seconds / network["seconds"],  # a mean is never above the best of three
                    "of_whole": seconds / looks[-1][NETWORK]["seconds"],
                    "test_there": own["test"] if own else 0.0,
                    "test_halfway": looks[LOOKS // 2 - 1][way]["test"],
                    "test_first_look": looks[0][way]["test"],
                    "test_end": looks[-1][way]["test"],
                }
            )
        table[way] = {key: finite(statistics.median(row[key] for row in rows)) for key in rows[0]}
        table[way]["of_network_by_seed"] = [finite(row["of_network"]) for row in rows]
    return table


def finite(value: float) -> float | None:
    return round(value, 4) if abs(value) < float("inf") else None


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment(),
        "seeds": len(SEEDS),
        "looks": LOOKS,
        "workloads": {},
    }
    for workload, (*_, settings) in WORKLOADS.items():
        try:
            runs = [run(workload, seed) for seed in SEEDS]
        except PlywiseError as error:
            print(f"{workload} is left out: {error}")
            result["workloads"][workload] = {"left_out": "its data are not here"}
            continue
        table = compared(runs)
        result["workloads"][workload] = {"settings": settings, "ways": table}
        print(f"\n{workload}: {settings}")
        print(f"{'decides':24}", *(f"{head:>14}" for head in HEADS))
        for way, row in table.items():
            cells = [row[key] for key in ("of_network", "of_whole", "test_there", "test_end")]
            print(f"{way:24}", *(f"{'never' if cell is None else format(cell, '.3f'):>14}" for cell in cells))
    write_whole(Path(__file__).with_suffix(".json"), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
