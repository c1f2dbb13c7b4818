"""Next characters of Shakespeare's plays."""

import math
from functools import partial

import torch

from plywise.arena.task import SEQUENCES, Task
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import CharTransformer
from plywise.data.digits import Split
from plywise.data.parts import Data
from plywise.data.sets import load_tiny_shakespeare
from plywise.errors import DataError

VOCABULARY = 65
"""Different characters in the text."""
CONTEXT = 64
HELD = 400
"""Windows of validation, and of test."""


def make_data() -> Data:
    """Windows of 64 characters and the characters after each, in one row: no two windows overlap.

    The first tenths of the text are for training, then come those of validation, the last are the test's.

    Raises:
        PlywiseError: the file is not there, or is another text.
    """
    text = load_tiny_shakespeare()
    characters = sorted(set(text))
    if len(characters) != VOCABULARY:
        raise DataError(
            f"The text has {len(characters)} different characters, and tiny Shakespeare has {VOCABULARY}: it "
            "is another one, or damaged."
        )
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([numbers[character] for character in text])
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    sizes = [len(windows) - 2 * HELD, HELD, HELD]
    return Data(
        *(Split(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in windows.split(sizes))
    )


WORKLOADS = (
    Workload(
        "char-transformer",
        "A transformer of 2 blocks, 64 wide, 4 heads, on 64 characters of tiny Shakespeare: attention, layer "
        "norm, an embedding that is the last layer, too.",
        partial(CharTransformer, VOCABULARY, CONTEXT, width=64, depth=2, heads=4),
        make_data,
        Task(SEQUENCES.loss, SEQUENCES.metric, SEQUENCES.metric_name, chance=math.log(VOCABULARY)),
        batch_size=16,
        steps=250,
        blocks=2,
        classes=VOCABULARY,
    ),
)
