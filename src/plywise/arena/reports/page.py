"""Makes one HTML file that opens offline: it holds its styles, scripts and numbers, and loads nothing."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from plywise._util.plain_json import drop_infinite, map_floats
from plywise._util.tables import format_number

TEMPLATES = Path(__file__).parent / "templates"
PALETTE_SIZE = 8  # colours --c0 … --c7 in page.css


def fill(template: str, styles: list[str], scripts: list[str], data: Any, **context: Any) -> str:
    """Fill a template that extends frame.html.

    Args:
        template: its name.
        styles: names of stylesheets, after those that all pages share.
        scripts: names of scripts, after charts.js and the charts library; run as one.
        data: what the scripts find in ``#data``, and nobody else: dicts, lists, numbers (null if not finite).
        context: what the template is filled with. Text is escaped everywhere it appears.

    Returns:
        The page.
    """
    import jinja2
    from markupsafe import Markup

    library = read_asset("vendor/uplot/uPlot.iife.min.js")
    script = "\n".join(map(read_asset, ["charts.js", *scripts]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    return environment.get_template(template).render(
        palette_size=PALETTE_SIZE,
        data=Markup(inline_json(map_floats(data, drop_infinite))),
        styles=Markup("\n".join(map(read_asset, ["vendor/uplot/uPlot.min.css", "page.css", *styles]))),
        library=Markup(library),
        library_licence=Markup(read_asset("vendor/uplot/LICENSE")),
        script=Markup(script),
        # The browser runs these two scripts and no other, whatever a name in the numbers contains.
        script_hashes=Markup(" ".join(_make_csp_hash(source) for source in (library, script))),
        **context,
    )


def inline_json(value: Any) -> str:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def read_asset(name: str) -> str:
    """Return the text of a file beside the templates."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _make_csp_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
