"""Every error leads to the page that says more."""

import pickle
import re
import traceback
from pathlib import Path

import pytest

from plywise import errors

ROOT = Path(__file__).parents[1]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_shows_its_place_on_the_page(kind):
    error = pickle.loads(pickle.dumps(kind("What is wrong.")))
    assert str(error) == "What is wrong."
    assert "".join(traceback.format_exception(error)).endswith(f"What is wrong.\nMore: {error.page}\n")
    path, anchor = error.page.split("#")
    assert f"({anchor})=\n## {kind.__name__}" in (ROOT / path).read_text(encoding="utf-8")


def test_no_two_errors_have_one_place():
    assert len({kind.page for kind in KINDS}) == len(KINDS) > 5
    assert all(re.fullmatch(r"docs/[\w/]+\.md#[\w-]+", kind.page) for kind in KINDS)
