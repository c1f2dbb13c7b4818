"""`plywise reproduce`: a paper's experiments again, its numbers beside ours."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plywise._util.environment import workers_for
from plywise.cli.console import console, table
from plywise.cli.interrupt import Stop
from plywise.cli.training import Switch
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.arena.reproductions.runner import Reproduction, ReproductionProgress
    from plywise.arena.run.executor import ProcessExecutor


def reproduce(
    paper: str | None = None,
    /,
    *,
    size: Literal["small", "full"] = "small",
    seeds: int = 3,
    only: str = "",
    out: Path = Path("runs/reproduce"),
    device: str = "cpu",
    workers: int | None = None,
    threads: int = 1,
    dry_run: Switch = False,
) -> None:
    """Run a paper's experiments again, and put its numbers beside ours.

    Without a paper it lists the papers, their experiments and their numbers. Each run is kept as it ends:
    after Ctrl-C the same command goes on with what is missing. The small size takes minutes, and
    says what was cut; at that size the order of methods is compared, not their numbers.

    For example:

        plywise reproduce                                # papers, experiments, numbers
        plywise reproduce proxprop                       # small size, three seeds
        plywise reproduce proxprop --only convnet
        plywise reproduce associated-learning --dry-run  # how long would it take?
        plywise reproduce proxprop --size full --device cuda

    Args:
        paper: proxprop, associated-learning, back-matching or consequentialism; or module:name of a
            plywise.arena.reproductions.experiment.Paper of your own.
        size: small, or full: the paper's network, data and epochs.
        seeds: runs of each method.
        only: experiments of the paper, if not all.
        out: folder; what is run goes into a folder of the paper's name in it.
        device: where it trains, as in cuda.
        workers: runs at once. Default: the cores over the threads; 1 on a GPU.
        threads: torch's threads in each run.
        dry_run: say how long it will take, and stop.
    """
    screen = console()
    if paper is None:
        if only:
            raise PlywiseError("--only names experiments of a paper: say which paper.", see="error-command")
        _list(screen)
        return
    from plywise.arena.reproductions import find_paper
    from plywise.arena.reproductions.runner import Reproduction
    from plywise.arena.run.executor import ProcessExecutor
    from plywise.arena.run.job import require_device

    names = [word.strip() for word in only.split(",") if word.strip()]
    made = Reproduction(paper, size, seeds, out / find_paper(paper).name, names, device)
    require_device(device)
    crew = ProcessExecutor(workers_for(device, threads) if workers is None else workers, threads)
    _announce(made, crew, screen)
    if dry_run:
        return
    stop = Stop(crew)
    try:
        # closed at once if interrupted here, so that no run is left behind
        with stop, closing(made.perform(crew)) as pieces:
            _follow(pieces, made, screen)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            if stop.presses < 2:
                made.finish()
        raise KeyboardInterrupt(
            f"{made.done} of {made.total} runs are kept in {shlex.quote(str(made.folder))}; the same command "
            "goes on."
        ) from None
    _show(made.finish(), screen)
    screen.print(
        f"Written: {made.folder / 'reproduce.json'} and {made.folder / 'reproduce.md'}", soft_wrap=True
    )


def _list(screen: Console) -> None:
    """All papers: experiments, and the numbers that are known."""
    from plywise.arena.reproductions import PAPERS, find_paper
    from plywise.arena.reproductions.tables import number

    for name in PAPERS:
        paper = find_paper(name)
        listed = table("experiment", "method", "the paper's number", title=f"{name}: {paper.title}")
        for experiment in paper.experiments:
            listed.add_row(experiment.name, experiment.about, "")
            unit = experiment.measure.unit
            for arm in experiment.arms:
                value = number(arm.number)
                listed.add_row("", arm.name, value if value in ("–", "diverged") else f"{value} {unit}")
        screen.print(listed)


def _announce(made: Reproduction, crew: ProcessExecutor, screen: Console) -> None:
    """Say what is run, and how long it may take."""
    from plywise.arena.run.budget import format_duration

    for experiment in made.experiments:
        screen.print(f"{experiment.name}: {experiment.sizes[made.size].about}.", soft_wrap=True)
    if made.done < made.total:
        screen.print("Measuring a few steps of each method.", style="dim")
        left = format_duration(made.measure(crew))
        screen.print(f"{made.total - made.done} of {made.total} runs are left: about {left}.")


def _follow(pieces: Iterator[ReproductionProgress], made: Reproduction, screen: Console) -> None:
    """Show the work: a bar in a terminal, a line for each run elsewhere."""
    if not screen.is_terminal:
        for piece in pieces:
            screen.print(_said(piece), soft_wrap=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=made.total, completed=made.done)
        for piece in pieces:
            bar.update(task, completed=piece.done, description=_said(piece).replace("[", "\\["))


def _said(piece: ReproductionProgress) -> str:
    """A run in one line."""
    from plywise.arena.run.budget import format_duration
    from plywise.arena.scoring.records import TUNING

    line = piece.line
    which = f"rate {line['rate']:g}" if line["purpose"] == TUNING else f"seed {line['seed']}"
    measured = line["test"] if line["loss"] and line["loss"][-1] is None else (line["loss"] or [None])[-1]
    result = line["failure"] or (f"{measured:.4g}" if measured is not None else "done")
    name = line["workload"].split("/")[1]
    return (
        f"[{piece.done:{len(str(piece.total))}}/{piece.total}] {name}: {line['method']}, {which}: {result}; "
        f"about {format_duration(piece.left)} left"
    )


def _show(about: dict[str, Any], screen: Console) -> None:
    """The tables."""
    from plywise.arena.reproductions.tables import HEADINGS, order, rows

    for experiment in about["experiments"]:
        title = f"{experiment['name']}: {experiment['measure']}, {experiment['unit']} ({about['size']} size)"
        shown = table(*HEADINGS, title=title)
        for row in rows(experiment):
            shown.add_row(*row)
        screen.print(shown)
        for sentence in order(experiment):
            screen.print(sentence, soft_wrap=True)
        screen.print()
