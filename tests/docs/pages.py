"""Runs the code of a page as a reader would: blocks in order, in one namespace, in an empty folder.

What a page may say in an HTML comment right above a block:

- ``<!-- skip: why -->``: the block is not run, for a reason that readers of the source see;
- ``<!-- run -->``: the commands of this console block are run, too, after the blocks above it.

A block whose first line is a comment with a file's name (``# mine.py``) is written to that file as well, so
that commands and later blocks find it. Commands run in that folder, in forks of this Python, and so do the
processes of torchrun; a script in a Python of its own.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ForkedCommand

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SETTINGS = {"OMP_NUM_THREADS": "1"}
SECONDS = 500.0
_FILE = re.compile(r"# (\w+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line that it begins in, and the comment above it."""

    kind: str
    code: str
    line: int
    note: str


def pages() -> list[Path]:
    """Every page that is written by hand."""
    own = [page for page in DOCS.rglob("*.md") if not {"generated", "_build"} & set(page.parts)]
    return [ROOT / "README.md", *sorted(own)]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"], found["code"], text.count("\n", 0, found.start("code")), found["note"] or "")
        for found in _FENCE.finditer(text)
    ]


def run(page: Path, folder: Path) -> int:
    """Run what is to be run of a page, in a folder; return how many blocks of Python it has."""
    names: dict[str, Any] = {"__name__": "page"}
    count = 0
    for block in blocks(page):
        count += block.kind == "python"
        if block.note.startswith("skip"):
            continue
        if block.kind == "python":
            if name := _FILE.match(block.code):
                (folder / name[1]).write_text(block.code, encoding="utf-8")
            # tracebacks show the page's own lines
            exec(compile("\n" * block.line + block.code, page, "exec"), names)
        elif block.kind == "console" and block.note == "run":
            for command in commands(block.code):
                _run(command, folder)
    return count


def commands(text: str) -> list[list[str]]:
    """The words of the commands after ``$``; a backslash goes on in the next line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def _run(words: list[str], folder: Path) -> None:
    runners = {"python": _run_script, "torchrun": _run_ranks}
    code, out, err = runners.get(words[0], _run_command)(words, folder)
    assert code == 0, f"{shlex.join(words)}\n{out[-2000:]}\n{err[-4000:]}"


def _run_script(words: list[str], folder: Path) -> tuple[int, str, str]:
    """A script of the page's, in a Python of its own: `check_rule` wants to be in the first process."""
    command = [sys.executable, *words[1:]]
    done = subprocess.run(
        command, env={**os.environ, **SETTINGS}, cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )
    return done.returncode, done.stdout, done.stderr


def _run_ranks(words: list[str], folder: Path) -> tuple[int, str, str]:
    """Fork the processes that torchrun would start: a Python of its own imports torch for five seconds."""
    option, count, *program = words[1:]
    assert option == "--nproc-per-node"
    program = program[1:] if program[0] == "-m" else ["python", *program]
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    world = {**SETTINGS, **place, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [
        ForkedCommand(
            program,
            {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            Path(f"{folder}.{rank}.out"),
            Path(f"{folder}.{rank}.err"),
        )
        for rank in range(int(count))
    ]
    try:
        ended = [(rank.wait(SECONDS), *rank.communicate()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return max(ended, key=lambda end: abs(end[0]))


def _run_command(words: list[str], folder: Path) -> tuple[int, str, str]:
    command = ForkedCommand(words, SETTINGS, Path(f"{folder}.out"), Path(f"{folder}.err"))
    try:
        return command.wait(SECONDS), *command.communicate()
    finally:
        command.kill()
