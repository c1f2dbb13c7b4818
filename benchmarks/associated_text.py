"""Compare Associated Learning on text, after its authors' later code, with backpropagation.

    python benchmarks/associated_text.py                     # writes associated_text.json; resumes
    python benchmarks/associated_text.py --network LSTM
    python benchmarks/associated_text.py --small             # one seed and a few steps; writes nothing

The task is to classify film reviews (IMDB) as good or bad, with 2,500 reviews for training and 2,500 for the
test. The input is the first 150 words of a review, from a vocabulary of the 10,000 most frequent words. The
network is an embedding of width 100, then two LSTMs (64 units in each direction; the state is passed on) or
two layers of a transformer; codes of 64, batches of 64, Adam. "Associated Learning" uses tanh maps, cross-
entropy at the first decoder, and codes that learn from the bridges. "backprop" trains the network that
Associated Learning predicts with, end to end by cross-entropy. The rate of each method is the better of two
on 500 training reviews that are held out; then three fresh seeds run with it. The accuracy of each depth is
measured too.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw
from figure_tables import write_associated_text
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise._util.modes import evaluating
from plywise.local.associated_maps import tanh_decoder, tanh_encoder
from plywise.local.associated_text import lstm_text, transformer_text
from tuning import DATA

OUT = Path(__file__).with_suffix(".json")
WORDS, LENGTH, WIDTH, CODE, BATCH, HELD = 10_000, 150, 100, 64, 64, 500
RATES, SEEDS, EPOCHS = (1e-3, 3e-3), (0, 1, 2), 4
NETWORKS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: lstm_text(WORDS, WIDTH, 64),
    "Transformer": lambda: transformer_text(WORDS, WIDTH, 4, dim_feedforward=128),
}
WAYS = ("Associated Learning", "backprop")


def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the reviews as word indices, padded with 0, and their labels (1 for good)."""
    sys.path.insert(0, str(DATA))
    from load_data import text_set

    parts = {part: text_set("imdb_subset", part) for part in ("train", "test")}
    split = {
        part: [re.findall(r"[a-z']+", text.lower()) for text in texts] for part, (texts, _) in parts.items()
    }
    common = Counter(word for words in split["train"] for word in words).most_common(WORDS - 2)
    numbers = {word: number for number, (word, _) in enumerate(common, start=2)}
    loaded = {}
    for part, reviews in split.items():
        x = torch.zeros(len(reviews), LENGTH, dtype=torch.long)
        for row, words in zip(x, reviews, strict=True):
            indices = [numbers.get(word, 1) for word in words[:LENGTH]]
            row[: len(indices)] = torch.tensor(indices)
        labels = parts[part][1]
        loaded[part] = x, torch.tensor([int(label == "pos") for label in labels])
    order = torch.randperm(len(loaded["train"][1]), generator=torch.Generator().manual_seed(0))
    x, y = (tensor[order] for tensor in loaded["train"])
    return {"held": (x[:HELD], y[:HELD]), "train": (x[HELD:], y[HELD:]), "test": loaded["test"]}


def accuracy(module: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    with evaluating(module), torch.no_grad():
        pairs = zip(part[0].split(250), part[1].split(250), strict=True)
        correct = sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs)
    return round(100 * correct / len(part[1]), 2)


def train(network: str, way: str, rate: float, seed: int, data: Any, steps: int) -> list[float]:
    """Train, and return the accuracy on ``data["judge"]``, for Associated Learning of each depth."""
    torch.manual_seed(seed)
    modules, bridges = NETWORKS[network]()
    x, y = data["train"]
    learner = pw.AssociatedLearning(
        pw.Blocks(modules, x[:2]),
        2,
        code=CODE,
        bridge=bridges,
        encoder=tanh_encoder,
        decoder=tanh_decoder,
        loss=F.cross_entropy,
        detach_target=False,
        seed=seed,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=rate),
    )
    path = learner.as_module()
    path.decoders[-1] = path.decoders[-1] if way == WAYS[0] else path.decoders[-1][0]  # logits need no tanh
    optimizer = torch.optim.Adam(path.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        if way == WAYS[0]:
            learner.step(x[rows], y[rows])
        else:
            path.train()
            optimizer.zero_grad()
            F.cross_entropy(path(x[rows]), y[rows]).backward()
            optimizer.step()
    depths = range(1, len(modules) + 1) if way == WAYS[0] else ()
    return [accuracy(learner.as_module(depth), data["judge"]) for depth in depths] or [
        accuracy(path, data["judge"])
    ]


def read() -> dict[str, Any]:
    if OUT.exists():
        return json.loads(OUT.read_text())
    return {"environment": environment(), "epochs": EPOCHS, "networks": {name: {} for name in NETWORKS}}


def run(networks: list[str], small: bool) -> None:
    data = load()
    steps = 5 if small else EPOCHS * len(data["train"][1]) // BATCH
    rates, seeds = (RATES[:1], SEEDS[:1]) if small else (RATES, SEEDS)
    for network in networks:
        for way in WAYS:
            if way in read()["networks"][network] and not small:
                continue
            held, judge = ({**data, "judge": data[part]} for part in ("held", "test"))
            tuning = {rate: train(network, way, rate, 100, held, steps)[-1] for rate in rates}
            rate = max(tuning, key=lambda rate: tuning[rate])
            final = [train(network, way, rate, seed, judge, steps) for seed in seeds]
            print(f"{network:12} {way:20} rate {rate:g}: {final}", flush=True)
            if not small:
                result = read()
                result["networks"][network][way] = {"rate": rate, "tuning": tuning, "test": final}
                write_whole(OUT, json.dumps(result, indent=1) + "\n")
    if not small:
        print(write_associated_text(""))


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="default: both")
    parser.add_argument("--small", action="store_true", help="run a few steps and write nothing")
    options = parser.parse_args()
    run(options.network or list(NETWORKS), options.small)


if __name__ == "__main__":
    main()
