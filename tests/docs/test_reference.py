"""The pages that are written from the code say what the code says; links and errors have their places."""

import html
import re
import sys
import tomllib

import pytest
import yaml
from markdown_it import MarkdownIt

from plywise.registry.find import ROOMS

from .pages import DOCS, ROOT, pages

EXTENSIONS = DOCS / "extensions"
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
_ERROR = re.compile(r"^ *class ([A-Za-z]\w*Error)\b", re.MULTILINE)
METHODS = [(room, name) for room, names in ROOMS.items() for name in names]


@pytest.fixture(scope="module")
def extensions():
    sys.path.insert(0, str(EXTENSIONS))
    import method_cards
    import written_pages

    yield method_cards, written_pages
    sys.path.remove(str(EXTENSIONS))


@pytest.fixture(scope="module")
def generated(extensions, tmp_path_factory):
    cards, written = extensions
    folder = tmp_path_factory.mktemp("generated")
    written.write_cards(folder / "methods", cards.methods_by_room(), written.write_if_new)
    written.write_commands(folder / "commands.md")
    written.write_results(folder / "results")
    return folder


def plain(markdown):
    """The words that a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", MarkdownIt("commonmark").render(markdown))).strip()


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_the_page_of_a_method_says_what_its_docstring_says(generated, extensions, room, name):
    from plywise.registry.card import SECTIONS, read_card
    from plywise.registry.find import find

    card = read_card(find(name))
    page = (generated / "methods" / room / f"{name}.md").read_text()
    for section in SECTIONS:
        body = re.search(rf"^## {section}\n\n(.*?)\n\n## ", page, re.MULTILINE | re.DOTALL)
        assert body, section
        said = re.sub(r"`+", "", getattr(card, section.lower().replace(" ", "_")))
        assert plain(body[1]).casefold() == said.casefold(), section
    for parameter in card.hyper_parameters:
        assert f"| `{parameter.name}` | `{parameter.default}` |" in page
    assert card.example in page
    assert f"({room}/{name}.md)" in (generated / "methods" / "index.md").read_text()


def test_signs_have_no_meaning_but_backquotes(extensions):
    cards, _ = extensions
    text = "a*b* _c_ <d> [e](f) | g~h # `i*j*` and ``k|l``"
    assert plain(cards.prose(text)) == text.replace("`", "")


def test_papers_and_code_have_links(generated):
    (path,) = (generated / "methods").rglob("AssociatedLearning.md")
    page = path.read_text()
    assert "[arXiv 1906.05560](https://arxiv.org/abs/1906.05560)" in page
    assert (
        "[SamYWK/Associated\\_Learning](https://github.com/SamYWK/Associated_Learning) (TensorFlow 1)" in page
    )
    assert "[Hibb-bb/AL](https://github.com/Hibb-bb/AL), of" in page


def test_the_page_on_installing_has_the_matrix_of_ci():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix, wheels = (jobs[name]["strategy"]["matrix"] for name in ("test", "package"))
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    head = " | ".join(["", *(f"torch {version}" for version in matrix["torch"]), ""]).strip()
    assert f"| {head}" in page
    assert f"| Python {', '.join(matrix['python'])} |" in page
    python_of = {one["torch"]: one["python"] for one in wheels["include"]}
    cells = " | ".join(f"Python {python_of[v]}" if v in python_of else "" for v in matrix["torch"])
    assert f"in a fresh environment | {cells} |" in page
    for extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]:
        assert extra in ("docs", "dev") or f"`{extra}`" in page


def test_a_method_that_is_gone_leaves_no_page(extensions, tmp_path):
    cards, written = extensions
    old = tmp_path / "rules" / "Gone.md"
    written.write_if_new(old, "# Gone")
    written.write_cards(tmp_path, cards.methods_by_room(), written.write_if_new)
    assert not old.exists()


def test_every_command_is_on_its_page(generated):
    from plywise.cli import app

    page = (generated / "commands.md").read_text()
    for name in app:
        assert name.startswith("-") or f"## plywise {name}\n" in page


def test_pictures_and_links_of_the_results_are_there(generated):
    for page in (generated / "results").glob("*.md"):
        for target in _LINK.findall(page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_between_pages_lead_somewhere(generated):
    for page in pages():
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            if "://" in target or "generated/gallery" in target:
                continue
            path = (page.parent / target).resolve()
            if "generated" in path.parts:
                path = generated / path.relative_to(DOCS / "generated")
            assert path.exists(), f"{page.relative_to(ROOT)}: {target}"


def exceptions():
    """Names of the exceptions that plywise defines, but for those that never leave a module."""
    source = ROOT / "src" / "plywise"
    tests = source / "testing" / "contract"
    for file in sorted(path for path in source.rglob("*.py") if path.parent != tests):
        yield from _ERROR.findall(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(set(exceptions())))
def test_every_error_has_an_entry_with_a_stable_anchor(name):
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    anchor = re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()
    assert re.search(rf"^\({anchor}\)=\n## {name}:", text, re.MULTILINE)


def test_anchors_of_errors_are_unique():
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    anchors = re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)
    assert len(anchors) == len(set(anchors)) > 10
