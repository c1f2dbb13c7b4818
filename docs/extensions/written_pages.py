"""Pages that are written from the code before each build, into docs/generated: they cannot go stale.

- a card for every method, from its docstring (`method_cards`);
- the commands, from their own ``--help``;
- the figures of the benchmarks, from the pages beside them.
"""

import io
import re
import shutil
from pathlib import Path

from method_cards import methods_by_room, write_cards

DOCS = Path(__file__).parents[1]
REPOSITORY = DOCS.parent
GENERATED = DOCS / "generated"
RESULTS = {
    "benchmarks": REPOSITORY / "benchmarks" / "README.md",
    "arena": REPOSITORY / "benchmarks" / "arena" / "README.md",
    "reproductions": REPOSITORY / "benchmarks" / "reproduce" / "README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#]+)(#[^)]*)?\)")


def write_if_new(path: Path, text: str) -> None:
    """Write a page, unless it says the same already: Sphinx then has nothing to do for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_commands(path: Path) -> None:
    """One page with the help of every command."""
    from rich.console import Console

    from plywise.cli import app

    def help_of(words: list[str]) -> str:
        screen = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        app.help_print(words, console=screen)
        return "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines())

    names = sorted(name for name in app if not name.startswith("-"))
    parts = ["# Commands", f"```text\n{help_of([])}\n```"]
    parts += [f"## plywise {name}\n\n```text\n{help_of([name])}\n```" for name in names]
    write_if_new(path, "\n\n".join(parts) + "\n")


def write_results(folder: Path) -> None:
    """The pages beside the benchmarks, with their pictures; links to files stay as the files' names."""
    pages = {source: name for name, source in RESULTS.items()}
    for source, name in pages.items():

        def moved(link: re.Match[str], source: Path = source) -> str:
            picture, words, target = link[1], link[2], (source.parent / link[3]).resolve()
            if picture:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, folder / target.name)
                return f"![{words}]({target.name})"
            page = pages.get(target / "README.md" if target.is_dir() else target)
            if page is not None:
                return f"[{words}]({page}.md)"
            return words if "`" in words else f"{words} (`{target.relative_to(REPOSITORY)}`)"

        text = _LINK.sub(moved, source.read_text(encoding="utf-8"))
        write_if_new(folder / f"{name}.md", text)


def write_all(app: object = None) -> None:
    """Write every page."""
    write_cards(GENERATED / "methods", methods_by_room(), write_if_new)
    write_commands(GENERATED / "commands.md")
    write_results(GENERATED / "results")


def setup(app):
    """Run before Sphinx looks for pages."""
    app.connect("builder-inited", write_all, priority=100)
    return {"parallel_read_safe": True}
