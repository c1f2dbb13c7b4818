"""`plywise help`: prints the documentation of errors."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import StringIO
from itertools import takewhile
from pathlib import Path

from cyclopts import App

from plywise._util.suggest import suggestion
from plywise.cli.console import PIPE_WIDTH, console, print_json, table
from plywise.cli.training import Switch
from plywise.errors import PAGE, CommandError

_HEADING = re.compile(r"^\(([\w-]+)\)=\n(#{2,3}) (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


@dataclass(frozen=True)
class Topic:
    """A section of the page of errors.

    Attributes:
        name: its name for `plywise help` and in the last line of an error.
        title: its heading.
        text: its text, in Markdown without links.
        is_kind: whether it is about a kind of errors, with sections below it.
        parts: names of these sections.
    """

    name: str
    title: str
    text: str
    is_kind: bool
    parts: tuple[str, ...]


def help(topic: str | None = None, /, *, json: Switch = False) -> None:
    """Print what the documentation says of an error; without a topic, list all topics.

    The last line of each error names its topic.

    For example:

        plywise help
        plywise help attach-no-layer
        plywise help StateError
        plywise help bench                       # the same as plywise bench --help

    Args:
        topic: name of a section, of an error, or of a command.
        json: print it as JSON.
    """
    topics = read_topics()
    if topic is None:
        _list(topics, json)
        return
    from plywise.cli import app

    found = {name.lower(): one for name, one in topics.items()}
    found |= {
        one.title.partition(":")[0].lower(): one for one in topics.values() if one.parts or ":" in one.title
    }
    key = topic.lower().rpartition("#")[2]
    commands = [name for name in app if not name.startswith("-")]
    if key in commands:
        _print_command(app, key, json)
        return
    if key not in found:
        hint = suggestion(key, (*topics, *commands)) or ""
        raise CommandError(f"There is no help on {topic!r}. {hint}`plywise help` lists all topics.")
    one = found[key]
    if json:
        print_json({**vars(one), "sections": [topics[name] for name in one.parts]})
    else:
        _print([one, *(topics[name] for name in one.parts)])


def _print_command(app: App, name: str, json: bool) -> None:
    if not json:
        app.help_print([name])
        return
    from rich.console import Console

    with StringIO() as text:
        app.help_print([name], console=Console(file=text, width=PIPE_WIDTH, color_system=None))
        print_json({"name": name, "text": text.getvalue()})


def read_topics() -> dict[str, Topic]:
    """Return the sections of the page of errors, in order, by name."""
    page = find_page().read_text(encoding="utf-8")
    found = list(_HEADING.finditer(page))
    ends = [*(one.start() for one in found[1:]), len(page)]
    topics: dict[str, Topic] = {}
    for place, (heading, end) in enumerate(zip(found, ends, strict=True)):
        text = _LINK.sub(r"\1", page[heading.end() : end]).strip()
        below = takewhile(lambda other: other[2] == "###", found[place + 1 :]) if heading[2] == "##" else ()
        parts = [other[1] for other in below]
        topics[heading[1]] = Topic(heading[1], heading[3], text, heading[2] == "##", tuple(parts))
    return topics


def find_page() -> Path:
    """The page of errors: the copy in the installed package, or the documentation's own in a source tree."""
    package = Path(__file__).parents[1]
    copy = package / Path(PAGE).name
    return copy if copy.exists() else package.parents[1] / PAGE


def _list(topics: dict[str, Topic], json: bool) -> None:
    if json:
        print_json(list(topics.values()))
        return
    rows = table("topic", "what it is about")
    for one in topics.values():
        rows.add_row(one.name if one.is_kind else f"  {one.name}", _strip_markup(one.title))
    screen = console()
    screen.print(rows)
    screen.print("`plywise help TOPIC` shows one; `plywise COMMAND --help` is about a command.")


def _print(topics: Iterable[Topic]) -> None:
    from rich.markdown import Markdown

    screen = console()
    show: Callable[[str], object] = (lambda text: Markdown(text)) if screen.is_terminal else str
    for one in topics:
        screen.print(f"{_strip_markup(one.title)}  ({one.name})\n", style="bold")
        if one.text:
            screen.print(show(one.text))
            screen.print()


def _strip_markup(text: str) -> str:
    return text.replace("`", "")
