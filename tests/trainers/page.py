"""The code of docs/how-to/trainers.md, so that the tests run what the page shows."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "trainers.md"
SHARED = "What the recipes share"


def recipe(section: str, **changes: Any) -> dict[str, Any]:
    """The names that the shared code and one section define, after ``changes`` to the shared ones."""
    names: dict[str, Any] = {"__name__": "trainers_page"}
    _run(SHARED, names)
    assert names.keys() >= changes.keys()
    names.update(changes)
    _run(section, names)
    return names


def _run(section: str, names: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    part = re.search(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert part, f"{PAGE.name} has no section {section!r}"
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", part[0], re.MULTILINE | re.DOTALL))
    assert blocks, f"section {section!r} has no code"
    for block in blocks:
        above = text.count("\n", 0, part.start() + block.start(1))
        exec(compile("\n" * above + block[1], PAGE, "exec"), names)  # tracebacks show the page's lines
