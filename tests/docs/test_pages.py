"""The code of every page runs, what pages point at is there, and every error has its entry."""

import re
import sys

import pytest

from .pages import DOCS, ROOT, blocks, pages, run

ELSEWHERE = {DOCS / "how-to" / "trainers.md": "tests/trainers"}
"""Pages whose code other tests run, with more than the page shows."""

NEEDS = {
    DOCS / "how-to" / name: package
    for name, package in (
        ("hugging-face.md", "transformers"),
        ("timm.md", "timm"),
        ("pyg.md", "torch_geometric"),
        ("lora.md", "peft"),
    )
}
"""Packages that plywise does not bring and a page is about."""

PAGES = pages()


def name_of(page):
    return str(page.relative_to(ROOT))


# of peft, which still asks transformers by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.timeout(600)  # processes with torch in them start slowly on a busy machine
@pytest.mark.parametrize("page", [one for one in PAGES if one not in ELSEWHERE], ids=name_of)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason="the page is about it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    text = page.read_text(encoding="utf-8")
    assert run(page, tmp_path) == text.count("```python"), "a block that is not seen would not be run"
    for name in set(sys.modules) - before:  # modules of the page's own, which another page may name alike
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def test_pages_that_are_tested_elsewhere():
    for page, where in ELSEWHERE.items():
        assert page.name in (ROOT / where / "page.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_skipped_only_with_a_reason(page):
    for block in blocks(page):
        if block.note.startswith("skip"):
            assert re.fullmatch(r"skip: \w.{10,}", block.note), f"{name_of(page)}, line {block.line}"
