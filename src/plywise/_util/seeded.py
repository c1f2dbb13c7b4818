"""Seeds from texts, and random numbers from a seed in a block."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def make_seed(text: str, size: int = 8) -> int:
    """Make a seed of ``size`` bytes from a text: the same on every machine, unlike Python's ``hash``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's random numbers in the block; restore their states afterwards.

    Example:
        >>> with seeded(3):
        ...     once = torch.rand(2)
        >>> with seeded(3):
        ...     print(torch.equal(once, torch.rand(2)))
        True
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
