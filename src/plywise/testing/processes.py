"""Starts two processes for a test, forked from one that has imported torch, and always ends them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["plywise.pipeline.pipeline", "plywise.local.local_loss", "plywise.rules.foof", "torch._dynamo"]
)  # the first step of an optimizer imports the last one
DEADLINE = 240.0
"""The seconds that two processes may take."""


def run_two_ranks(
    main: Callable[..., None], folder: Path, *args: Any, codes: tuple[int, int] = (0, 0)
) -> list[dict[str, Any]]:
    """Run ``main(rank, folder, *args)`` in two processes; return what they left in ``folder/rank.pt``.

    They must end with the exit codes ``codes``.
    """
    processes = [CONTEXT.Process(target=main, args=(rank, folder, *args)) for rank in range(2)]
    end = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
        found = tuple(process.exitcode for process in processes)
        assert found == codes, "a rank failed or missed the deadline"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
