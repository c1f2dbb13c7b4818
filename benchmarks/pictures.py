"""Save the pictures of the benchmarks as small SVG files with the same bytes each time.

python benchmarks/pictures.py benchmarks/*.svg    # shrink pictures that another program has saved
"""

import io
import re
import sys
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole

NUMBER = re.compile(r"-?\d+\.\d+")
COORDINATES = re.compile(
    r'(?<= d=")[^"]*|(?<= x=")[^"]*|(?<= y=")[^"]*|(?<=translate\()[^)]*|(?<= points=")[^"]*'
)
INVISIBLE = re.compile(r"<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*|<!--.*?-->\s*", re.DOTALL)


def save_picture(figure: Any, path: Path | str) -> None:
    """Save a matplotlib figure as a small SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "plywise"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    write_whole(Path(path), shrink(file.getvalue()))


def shrink(svg: str) -> str:
    """Round the coordinates of an SVG to a tenth of a point, and remove its invisible parts."""
    return re.sub(r"\n\s*", "\n", COORDINATES.sub(_round_coordinates, INVISIBLE.sub("", svg)))


def _round_coordinates(coordinates: re.Match[str]) -> str:
    return " ".join(NUMBER.sub(lambda number: f"{round(float(number[0]), 1):g}", coordinates[0]).split())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_whole(Path(name), shrink(Path(name).read_text(encoding="utf-8")))
