"""Every error leads to the page that says more, and to the very section where there is one."""

import ast
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from plywise import Backprop, ProxProp, errors
from plywise._util import import_path as addresses
from plywise.arena.run.search import find_search
from plywise.training.config import TrainConfig
from plywise.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_shows_its_place_on_the_page(kind):
    error = pickle.loads(pickle.dumps(kind("What is wrong.")))
    assert str(error) == "What is wrong."
    anchor = error.page.split("#")[1]
    assert "".join(traceback.format_exception(error)).endswith(f"What is wrong.\n{errors.MORE}{anchor}\n")
    path, anchor = error.page.split("#")
    assert f"({anchor})=\n## {kind.__name__}" in (ROOT / path).read_text(encoding="utf-8")


def test_no_two_errors_have_one_place():
    assert len({kind.page for kind in KINDS}) == len(KINDS) > 5
    assert all(re.fullmatch(r"docs/[\w/]+\.md#[\w-]+", kind.page) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_shows_the_section_that_it_names(kind):
    error = pickle.loads(pickle.dumps(kind("What is wrong.", see="this-one")))
    assert error.page == f"{errors.PAGE}#this-one" != kind.page
    assert error.args == ("What is wrong.",)
    assert "".join(traceback.format_exception(error)).endswith(f"What is wrong.\n{errors.MORE}this-one\n")


# ---- all sections, and all places that raise ----------------------------------------------------------


def sections() -> dict[str, str]:
    """Anchors of the page's finer sections, with the name of the error that each is under."""
    found, kind = {}, ""
    headings = re.finditer(
        r"^\(([\w-]+)\)=\n(##+) ([^\s:]+)", (ROOT / errors.PAGE).read_text(encoding="utf-8"), re.MULTILINE
    )
    for anchor, level, word in (heading.groups() for heading in headings):
        if level == "##":
            kind = word
        else:
            found[anchor] = kind
    return found


def named() -> Iterator[tuple[str, str, str]]:
    """Place, error and anchor of everything in src that makes an error which names a section."""
    names = {kind.__name__ for kind in KINDS}
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                for keyword in node.keywords:
                    assert (keyword.arg, type(keyword.value)) == ("see", ast.Constant), (
                        f"{file}:{node.lineno}"
                    )
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node.func.id, keyword.value.value


def test_sections_that_errors_name_are_there_and_under_the_error():
    there = sections()
    assert [place for place, kind, anchor in named() if there.get(anchor) != kind] == []


def test_every_section_is_named_by_an_error():
    assert len(sections()) > 10
    assert set(sections()) - {anchor for _, _, anchor in named()} == set()


def attach_twice(_):
    model = nn.Linear(2, 2)
    ProxProp(tau=1.0).attach(model).attach(model)


FAILURES = {
    "attach-twice": attach_twice,
    "attach-no-layer": lambda _: ProxProp(tau=1.0).attach(nn.Tanh()),
    "attach-optimizer": lambda _: Backprop().attach(nn.Linear(2, 2), 0.1),
    "attach-pattern": lambda _: Backprop().attach(nn.Linear(2, 2), exclude="no.such*"),
    "state-run": lambda folder: RunFolder(folder).plan(),
    "address-error": lambda _: addresses.load("model.py:make", "your model"),
    "bench-error": lambda _: find_search("randon"),
    "command-error": lambda _: TrainConfig(blocks=-1),
}


@pytest.mark.parametrize("anchor", FAILURES)
def test_what_goes_wrong_leads_to_its_section(anchor, tmp_path):
    with pytest.raises(errors.PlywiseError) as caught:
        FAILURES[anchor](tmp_path)
    assert caught.value.__notes__ == [f"{errors.MORE}{anchor}"]
