"""How the benchmarks save their pictures: the same bytes each time, and no more of them than can be seen.

python benchmarks/pictures.py benchmarks/*.svg    # make pictures small that another program has saved
"""

import io
import re
import sys
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole

NUMBER = re.compile(r"-?\d+\.\d+")
PLACES = re.compile(r'(?<= d=")[^"]*|(?<= x=")[^"]*|(?<= y=")[^"]*|(?<=translate\()[^)]*|(?<= points=")[^"]*')
UNSEEN = re.compile(r"<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*|<!--.*?-->\s*", re.DOTALL)


def save_picture(figure: Any, path: Path | str) -> None:
    """Save a figure of matplotlib as a small SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "plywise"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    write_whole(Path(path), shrink(file.getvalue()))


def shrink(svg: str) -> str:
    """An SVG with places to a tenth of a point, and without what no viewer shows."""
    return re.sub(r"\n\s*", "\n", PLACES.sub(_round_places, UNSEEN.sub("", svg)))


def _round_places(places: re.Match[str]) -> str:
    return " ".join(NUMBER.sub(lambda number: f"{round(float(number[0]), 1):g}", places[0]).split())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_whole(Path(name), shrink(Path(name).read_text(encoding="utf-8")))
