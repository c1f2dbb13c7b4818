"""Signs of life: every process notices, and can name, a stage that was killed, stopped or cut off.

Each process counts up a key of its own in a store and looks at everyone's. A count that stands still for
``patience`` seconds belongs to a stage that is gone; so does the store itself, which lives in the first one.
"""

import threading
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from plywise.errors import PipelineError

EVERY = 0.5  # seconds between two looks
FAILED = "failed"


class Watch:
    """Looks after the processes of a pipeline from a thread of its own.

    Args:
        store: a connection that nobody else uses.
        rank: this process.
        names: what each process is called, by rank.
        patience: seconds without a sign of life until a process counts as lost.
    """

    def __init__(self, store: TCPStore, rank: int, names: list[str], patience: float) -> None:
        self._store = store
        self._rank = rank
        self._names = names
        self._patience = patience
        self._trouble: str | None = None
        self._looked = time.monotonic()
        self._stop = threading.Event()
        store.set_timeout(timedelta(seconds=patience / 2))
        store.set(f"beat {rank}", "0")
        self._thread = threading.Thread(target=self._look_around, daemon=True, name="plywise watch")
        self._thread.start()

    def check(self) -> None:
        """Raise PipelineError if some process is lost."""
        silence = time.monotonic() - self._looked
        if self._trouble is None and silence > self._patience and not self._stop.is_set():
            self._trouble = f"{self._names[0]} (rank 0) has not answered for {silence:.0f} s"
        if self._trouble is not None:
            raise PipelineError(
                f"{self._names[self._rank]} stops: {self._trouble}. Start again from the last checkpoint; "
                "torchrun --max-restarts does so by itself."
            )

    def tell(self, what: str) -> None:
        """Let the others know why this process fails; best effort."""
        try:
            self._store.set(FAILED, f"{self._names[self._rank]} (rank {self._rank}) failed: {what}")
        except (RuntimeError, DistError):  # the store may be what is lost
            return

    def close(self) -> None:
        """Stop looking; the others are told not to wait for this process any more."""
        self._stop.set()
        self._thread.join(2 * EVERY)
        try:
            self._store.set(f"beat {self._rank}", "done")
        except (RuntimeError, DistError):
            return

    def _look_around(self) -> None:
        count = 0
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        seen = {rank: ("", time.monotonic()) for rank in others}
        while not self._stop.wait(EVERY):
            count += 1
            try:
                self._store.set(f"beat {self._rank}", str(count))
                if self._store.check([FAILED]):
                    self._trouble = self._store.get(FAILED).decode()
                    return
                for rank in others:
                    beat = self._store.get(f"beat {rank}").decode()
                    if beat != seen[rank][0]:
                        seen[rank] = beat, time.monotonic()
            except (RuntimeError, DistError) as error:
                if not self._stop.is_set():
                    self._trouble = (
                        f"{self._names[0]} (rank 0) was killed or cut off: its store is gone "
                        f"({_first_line(error)})"
                    )
                return
            now = time.monotonic()
            self._looked = now
            for rank, (beat, when) in seen.items():
                if beat != "done" and now - when > self._patience:
                    self._trouble = (
                        f"{self._names[rank]} (rank {rank}) has given no sign of life for {now - when:.0f} s"
                    )
                    return


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
