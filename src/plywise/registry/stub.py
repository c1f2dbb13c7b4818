"""Writes ``plywise/__init__.pyi``, from which type checkers know the names in `plywise`.

Run it when the table `plywise.registry.names` has changed: ``python -m plywise.registry.stub``.
"""

from collections import defaultdict
from pathlib import Path

from plywise.registry.names import ROOMS, list_top_names

PATH = Path(__file__).parents[1] / "__init__.pyi"


def make_stub() -> str:
    """Make the text of the stub: an import for each public name.

    Example:
        >>> "from plywise.rules.foof import Foof as Foof" in make_stub()
        True
    """
    names = defaultdict(list)
    for name, module in list_top_names().items():
        names[module].append(name)
    lines = [
        '"""Written by `python -m plywise.registry.stub` from `plywise.registry.names`."""',
        "",
    ]
    lines += [f"from plywise import {room} as {room}" for room in ROOMS]
    lines += ["from plywise._util.version import __version__ as __version__"]
    lines += [
        f"from plywise.{module} import {name} as {name}"
        for module in sorted(names)
        for name in sorted(names[module])
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PATH.write_text(make_stub(), encoding="utf-8")
