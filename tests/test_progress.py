"""What a terminal shows of work that goes on: how much is done, and how long the rest takes, at any width."""

from io import StringIO

import pytest
from rich.console import Console

from plywise._util.progress import Step, follow

LONG = "digits-mlp: associated-learning, tuned, seed 0: validation 0.09091, and more of it"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_long_text_hides_neither_count_nor_time(width):
    screen = Console(
        file=StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False
    )
    steps = (Step(done, 49, LONG, left=100.0 - done) for done in range(8, 12))
    follow(steps, screen, done=7, total=49)
    shown = screen.file.getvalue()
    for done in range(8, 12):
        assert f"{done}/49" in shown
        assert f"about {100 - done} s left" in shown
    assert ("and more of it" in shown) == (width == 200)
