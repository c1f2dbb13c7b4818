"""`plywise reproduce`: runs a paper's experiments again, and compares its numbers with ours."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plywise._util.environment import workers_for
from plywise._util.progress import Step, follow, format_duration
from plywise._util.words import split_words
from plywise.cli.console import VOLUME, console, notes, print_json, table
from plywise.cli.interrupt import Stop
from plywise.cli.training import Switch
from plywise.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.arena.reproductions.experiment import Paper
    from plywise.arena.reproductions.runner import Reproduction
    from plywise.arena.run.executor import ProcessExecutor
    from plywise.arena.run.experiment import Progress


def reproduce(
    paper: str | None = None,
    /,
    *,
    size: Literal["small", "middle", "full"] = "small",
    data: Literal["paper", "digits"] = "paper",
    seeds: int = 3,
    only: str = "",
    arms: str = "",
    out: Path = Path("runs/reproduce"),
    device: str = "cpu",
    workers: int | None = None,
    threads: int = 1,
    dry_run: Switch = False,
    json: Switch = False,
) -> None:
    """Run a paper's experiments again, and compare its numbers with ours.

    Without a paper it lists the papers, their experiments and their numbers. Each run is kept as it ends:
    after Ctrl-C the same command goes on with what is missing. The small size takes minutes, and
    says what was cut; at that size the order of methods is compared, not their numbers.

    For example:

        # papers, experiments, numbers
        plywise reproduce
        # a claim of a paper on the digits that come with plywise, in a minute
        plywise reproduce proxprop --data digits
        # the small size on the paper's data, three seeds; how long would it take?
        plywise reproduce proxprop
        plywise reproduce associated-learning --dry-run
        plywise reproduce proxprop --only convnet --size full --device cuda
        # some of many runs, the rest another day
        plywise reproduce proxprop --size middle --arms "BackProp, cg3* = 1"

    Args:
        paper: proxprop, associated-learning, back-matching or consequentialism; or module:name of a
            plywise.arena.reproductions.experiment.Paper of your own.
        size: small; middle, half an hour of a core for a seed (proxprop's table-1, associated-learning's
            cifar10-cnn and cifar10-vgg); or full: the paper's
            network, data and epochs.
        data: the paper's, which are to be fetched, or digits: those that come with plywise, with a network to
            match, in about a minute. Papers with a claim that shows on these: proxprop.
        seeds: runs of each method.
        only: experiments of the paper, if not all.
        arms: what is run of these: methods, as in cg3, or patterns of the names that are listed without a
            paper, as in "cg3* = 1". Results are of all runs that the folder holds.
        out: folder; what is run goes into a folder of the paper's name in it.
        device: where it trains, as in cuda.
        workers: runs at once. Default: the cores over the threads; 1 on a GPU.
        threads: torch's threads in each run.
        dry_run: say how long it will take, and stop.
        json: print papers or results as JSON; progress goes to standard error.
    """
    if paper is None:
        if only or arms:
            raise CommandError("--only and --arms name parts of a paper: say which paper.")
        _list(json)
        return
    screen = notes(apart=json)
    from plywise.arena.reproductions import find_paper
    from plywise.arena.reproductions.runner import Reproduction
    from plywise.arena.run.executor import ProcessExecutor
    from plywise.arena.run.job import require_device

    if data == "digits" and size != "small":
        raise CommandError("--data digits has a size of its own: leave out --size.")
    size_name = data if data == "digits" else size
    folder = out / find_paper(paper).name
    made = Reproduction(paper, size_name, seeds, folder, split_words(only), device, split_words(arms))
    require_device(device)
    executor = ProcessExecutor(workers_for(device, threads) if workers is None else workers, threads)
    _announce(made, executor, screen)
    if dry_run:
        return
    _run(made, executor, screen)
    _conclude(made, screen, json)


def _run(made: Reproduction, executor: ProcessExecutor, screen: Console) -> None:
    stop = Stop(executor)
    try:
        # closed at once if interrupted here, so that no run is left behind
        with stop, closing(made.run(executor)) as pieces:
            _follow(pieces, made, screen)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            if stop.presses < 2:
                made.write(made.summarize())
        raise KeyboardInterrupt(
            f"{made.done} of {made.total} runs are kept in {shlex.quote(str(made.folder))}; the same command "
            "goes on."
        ) from None


def _conclude(made: Reproduction, screen: Console, json: bool) -> None:
    about = made.summarize()
    if json:
        print_json(about)
    else:
        _show(about, console())
    made.write(about)  # last: a disk that is full costs the files alone
    if json:
        return
    screen.print(f"Written: {made.folder / 'reproduce.json'} and {made.folder / 'reproduce.md'}")


def _list(json: bool) -> None:
    """All papers: experiments, and the numbers that are known."""
    from plywise.arena.reproductions import PAPERS, find_paper
    from plywise.arena.reproductions.tables import write_number

    if json:
        print_json([_describe(find_paper(name)) for name in PAPERS])
        return
    screen = console()
    for name in PAPERS:
        paper = find_paper(name)
        listed = table("experiment", "method", "the paper's number", title=f"{name}: {paper.title}")
        for experiment in paper.experiments:
            listed.add_row(experiment.name, experiment.about, "")
            unit = experiment.measure.unit
            for arm in experiment.arms:
                value = write_number(arm.number)
                listed.add_row("", arm.name, value if value in ("–", "diverged") else f"{value} {unit}")
        screen.print(listed)


def _describe(paper: Paper) -> dict[str, Any]:
    """Return a paper for machines; a number of the paper's that diverged is the word."""
    return {
        "name": paper.name,
        "title": paper.title,
        "experiments": [
            {
                **{key: getattr(one, key) for key in ("name", "about", "where")},
                **{"measure": one.measure.name, "unit": one.measure.unit, "sizes": list(one.sizes)},
                "arms": [
                    {
                        "name": arm.name,
                        "sizes": arm.sizes,
                        "paper": "diverged"
                        if arm.number is not None and math.isnan(arm.number)
                        else arm.number,
                    }
                    for arm in one.arms
                ],
                "claims": [str(claim) for claim in one.claims],
            }
            for one in paper.experiments
        ],
    }


def _announce(made: Reproduction, executor: ProcessExecutor, screen: Console) -> None:
    """Say what is run, and how long it may take."""
    for experiment in made.experiments:
        screen.print(f"{experiment.name}: {experiment.sizes[made.size].about}.")
    if made.done < made.total:
        screen.print("Measuring a few steps of each method.", style="dim")
        left = format_duration(made.measure(executor))
        screen.print(f"{made.total - made.done} of {made.total} runs are left: about {left}.")


def _follow(pieces: Iterator[Progress], made: Reproduction, screen: Console) -> None:
    steps = (Step(piece.done, piece.total, _describe_run(piece.line), piece.seconds_left) for piece in pieces)
    follow(steps, screen, done=made.done, total=made.total, verbose=VOLUME.verbose)


def _describe_run(line: dict[str, Any]) -> str:
    from plywise.arena.scoring.records import TUNING

    which = f"rate {line['rate']:g}" if line["purpose"] == TUNING else f"seed {line['seed']}"
    measured = line["test"] if line["loss"] and line["loss"][-1] is None else (line["loss"] or [None])[-1]
    result = line["failure"] or (f"{measured:.4g}" if measured is not None else "done")
    name = line["workload"].split("/")[1]
    return f"{name}: {line['method']}, {which}: {result}"


def _show(about: dict[str, Any], screen: Console) -> None:
    from plywise.arena.reproductions.experiment import SIZE_WORDS
    from plywise.arena.reproductions.tables import HEADINGS, describe_claims, make_rows

    for experiment in about["experiments"]:
        size = SIZE_WORDS[about["size"]]
        title = f"{experiment['name']}: {experiment['measure']}, {experiment['unit']} ({size})"
        shown = table(*HEADINGS, title=title)
        for row in make_rows(experiment):
            shown.add_row(*row)
        screen.print(shown)
        for sentence in describe_claims(experiment):
            screen.print(sentence)
        screen.print()
