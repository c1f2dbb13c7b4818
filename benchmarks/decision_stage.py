"""Measure whether a decision stage on softmax vectors saves training time.

    python benchmarks/decision_stage.py               # writes benchmarks/decision_stage.json

A small ConvNet trains to the end and is evaluated 12 times on the way. Each evaluation compares the class
with the largest probability with `plywise.nn.DecisionStage` (a support vector machine or logistic regression
of scikit-learn) fitted to the softmax vectors of 1,000 training samples. The target is the network's
validation accuracy at the end, the mean of its last three evaluations. The time of an evaluation is the CPU
time of the training steps so far; the time of the stage includes one fit. Ratios are computed within a seed,
then medians over seeds. A target that is never reached counts as infinite time, with accuracy 0. The script
uses one thread.

The script has its own training loop because all classifiers evaluate the same training run with different
times, and each seed has other data. In the arena each classifier would train its own network, and all seeds
would use one data set.
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

SEEDS, EVALUATIONS, BATCH, STAGE_SAMPLES = range(3), 12, 64, 1000
NETWORK = "largest probability"
HEADINGS = ("time/network", "time/whole", "accuracy there", "at the end")
STAGES: dict[str, Callable[[], Any]] = {
    "support vector machine": SVC,
    "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
}
Data = tuple[Split, Split, Split]
Optimizer = Callable[[Any], torch.optim.Optimizer]


def read_digits(seed: int) -> Data:
    return tuple(Split(part.x.reshape(-1, 1, 8, 8), part.y) for part in load_digits(seed))


def read_fashion(seed: int) -> Data:
    x, y, x_test, y_test = (torch.from_numpy(np.array(part)) for part in load_grey_images("fashion_mnist"))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = (
        (x[order[:3000]], y[order[:3000]]),
        (x[order[-1000:]], y[order[-1000:]]),
        (x_test[:1000], y_test[:1000]),
    )
    return tuple(Split(images[:, None].float() / 255, labels.long()) for images, labels in parts)


WORKLOADS: dict[str, tuple[Callable[[int], Data], int, Optimizer, str]] = {
    "digits, Adam": (read_digits, 20, lambda p: torch.optim.Adam(p, 1e-3), "Adam(1e-3), 20 epochs"),
    "digits, Adam at ten times the rate": (
        read_digits,
        20,
        lambda p: torch.optim.Adam(p, 1e-2),
        "Adam(1e-2), 20 epochs",
    ),
    "Fashion-MNIST, Adam": (
        read_fashion,
        4,
        lambda p: torch.optim.Adam(p, 1e-3),
        "Adam(1e-3), 4 epochs of 3,000 images",
    ),
}


def make_convnet(side: int) -> nn.Sequential:
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


def compute_accuracy(predicted: Tensor, part: Split) -> float:
    return (predicted == part.y).double().mean().item()


def evaluate(model: nn.Module, data: Data, trained: float) -> dict[str, dict[str, float]]:
    """Return the seconds and accuracies of each classifier after ``trained`` seconds of training."""
    train, *held_out = data
    with torch.no_grad():
        accuracies = [compute_accuracy(model(part.x).argmax(1), part) for part in held_out]
    methods = {NETWORK: {"seconds": trained, "validation": accuracies[0], "test": accuracies[1]}}
    for name, classifier in STAGES.items():
        start = time.process_time()
        stage = DecisionStage(model, classifier())
        stage.fit([(train.x[:STAGE_SAMPLES], train.y[:STAGE_SAMPLES])])
        seconds = trained + time.process_time() - start
        accuracies = [compute_accuracy(stage.predict(part.x), part) for part in held_out]
        methods[name] = {"seconds": seconds, "validation": accuracies[0], "test": accuracies[1]}
    return methods


def run(workload: str, seed: int) -> list[dict[str, dict[str, float]]]:
    """Train once, and return the result of each evaluation."""
    load, epochs, make_optimizer, _ = WORKLOADS[workload]
    data = load(seed)
    train = data[0]
    torch.manual_seed(seed)
    model = make_convnet(train.x.shape[-1])
    optimizer = make_optimizer(model.parameters())
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(train.y)).split(BATCH)]
    stops = {round((number + 1) * len(batches) / EVALUATIONS) for number in range(EVALUATIONS)}
    trained, evaluations = 0.0, []
    for number, rows in enumerate(batches, start=1):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
        trained += time.process_time() - start
        if number in stops:
            evaluations.append(evaluate(model, data, trained))
    return evaluations


def find_reached(
    evaluations: list[dict[str, dict[str, float]]], method: str, target: float
) -> dict[str, float] | None:
    results = (evaluation[method] for evaluation in evaluations)
    return next((result for result in results if result["validation"] >= target), None)


def compare_runs(runs: list[list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Return medians over seeds: time to the target over the network's, and over the whole training."""
    table = {}
    for method in [NETWORK, *STAGES]:
        rows = []
        for evaluations in runs:
            target = statistics.mean(evaluation[NETWORK]["validation"] for evaluation in evaluations[-3:])
            first = find_reached(evaluations, method, target)
            network = find_reached(evaluations, NETWORK, target)
            seconds = first["seconds"] if first else float("inf")
            rows.append(
                {
                    "of_network": seconds
                    / network["seconds"],  # not None: a mean of three is at most their best
                    "of_whole": seconds / evaluations[-1][NETWORK]["seconds"],
                    "test_there": first["test"] if first else 0.0,
                    "test_halfway": evaluations[EVALUATIONS // 2 - 1][method]["test"],
                    "test_first_look": evaluations[0][method]["test"],
                    "test_end": evaluations[-1][method]["test"],
                }
            )
        table[method] = {key: round_finite(statistics.median(row[key] for row in rows)) for key in rows[0]}
        table[method]["of_network_by_seed"] = [round_finite(row["of_network"]) for row in rows]
    return table


def round_finite(value: float) -> float | None:
    return round(value, 4) if abs(value) < float("inf") else None


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment(),
        "seeds": len(SEEDS),
        "looks": EVALUATIONS,
        "workloads": {},
    }
    for workload, (*_, settings) in WORKLOADS.items():
        try:
            runs = [run(workload, seed) for seed in SEEDS]
        except PlywiseError as error:
            print(f"{workload} is left out: {error}")
            result["workloads"][workload] = {"left_out": "its data are not here"}
            continue
        table = compare_runs(runs)
        result["workloads"][workload] = {"settings": settings, "ways": table}
        print(f"\n{workload}: {settings}")
        print(f"{'classifier':24}", *(f"{head:>14}" for head in HEADINGS))
        for method, row in table.items():
            cells = [row[key] for key in ("of_network", "of_whole", "test_there", "test_end")]
            print(
                f"{method:24}", *(f"{'never' if cell is None else format(cell, '.3f'):>14}" for cell in cells)
            )
    write_whole(Path(__file__).with_suffix(".json"), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
