"""The full sweep: ``python -m tests.sweep.run`` (``--help``). Ctrl-C stops it, the same command goes on."""

import argparse
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

import torch

from .attaching import RULES
from .database import Sample, find_names
from .ledger import ROOT, Ledger
from .report import Report, format_report
from .selection import Settings, list_all_samples, sweep_quickly
from .worker import start_worker, sweep_in_time


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.run", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--modules", default="*", help='pattern of names, e.g. "nn.Conv*"')
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES), metavar="RULE")
    parser.add_argument("--inputs", type=int, default=64, help="most inputs a module, dtype and mode; 0: all")
    parser.add_argument("--part", choices=["promises", "torch", "both"], default="both")
    parser.add_argument(
        "--quick", action="store_true", help="what tests/sweep/test_quick.py runs, with counts"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="begin again, though a stopped sweep could go on"
    )
    parser.add_argument("--ledger", type=Path, default=ROOT / "runs" / "sweep.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Sweep, print the summary, and return the exit status: 0 if all held, 1 if not, 130 if stopped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    options = read_arguments(argv)
    modules = [name for name in find_names() if fnmatchcase(name, options.modules)]
    start = time.monotonic()
    if options.quick:
        total, stopped = run_quick(modules), False
    else:
        settings = Settings(
            rules=tuple(options.rules), promises=options.part != "torch", as_torch=options.part != "promises"
        )
        ledger = Ledger(options.ledger, settings, fresh=options.fresh)
        samples = list(list_all_samples(modules, (torch.float32, torch.float64), options.inputs))
        stopped = not run_full(samples, settings, ledger, options.jobs)
        total = ledger.total()
    print(f"\n{format_report(total)}\n{time.monotonic() - start:.0f} s")
    if stopped:
        print("Stopped: the same command goes on.")
        return 130
    return 1 if total.problems else 0


def run_quick(modules: list[str]) -> Report:
    total = Report()
    for module in modules:
        total.add(sweep_quickly(module))
    return total


def run_full(samples: list[Sample], settings: Settings, ledger: Ledger, jobs: int) -> bool:
    """Sweep what the ledger lacks; whether all was swept."""
    missing = [sample for sample in samples if str(sample) not in ledger.reports]
    print(f"{len(samples)} samples, {len(samples) - len(missing)} of them swept before; {ledger.path}")
    start = time.monotonic()
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        futures = [pool.submit(sweep_in_time, sample, settings) for sample in missing]
        for done, future in enumerate(as_completed(futures), 1):
            sample, report = future.result()
            ledger.add(sample, report)
            show_progress(sample, done, len(missing), time.monotonic() - start, ledger)
    except KeyboardInterrupt:
        print("\nStopping ...")
        return False
    except BrokenProcessPool:
        print("\nA process died (killed, out of memory, or a crash inside torch).")
        return False
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return True


def show_progress(sample: str, done: int, total: int, seconds: float, ledger: Ledger) -> None:
    """One line, written over on a terminal; in a file one for every hundred samples."""
    terminal = sys.stdout.isatty()
    if not terminal and done % 100 and done != total:
        return
    problems = sum(len(report.problems) for report in ledger.reports.values())
    left = seconds / done * (total - done)
    line = f"{done}/{total} · {seconds:.0f} s, about {left:.0f} s left · {problems} problems · {sample}"
    print(f"\r{line:100.100}" if terminal else line, end="" if terminal else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
