"""What a process of the full sweep does."""

import signal
from types import FrameType

import torch

from .database import Sample, load_infos
from .report import Report
from .selection import Settings, sweep_sample

SECONDS_A_SAMPLE = 300


def start_worker() -> None:
    """One thread; Ctrl-C is for the process that hands out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, stop_sample)
    torch.set_num_threads(1)
    load_infos()


def stop_sample(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no end after {SECONDS_A_SAMPLE} s")


def sweep_in_time(sample: Sample, settings: Settings) -> tuple[str, Report]:
    """A sample's report; what raises outside of all checks, or takes too long, is a problem of its own."""
    outside = Report(subject=str(sample), rule="any")
    signal.alarm(SECONDS_A_SAMPLE)
    try:
        return str(sample), sweep_sample(sample, settings)
    except Exception as error:
        outside.record("sweep", f"raises {type(error).__name__}: {error}")
        return str(sample), outside
    finally:
        signal.alarm(0)
