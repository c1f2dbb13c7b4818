"""The tutorials that are notebooks: what they show was made by their scripts, and the scripts still run."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from .pages import DOCS, ROOT

SCRIPTS = DOCS / "notebooks"
sys.path.insert(0, str(SCRIPTS))
import make  # noqa: E402

sys.path.remove(str(SCRIPTS))
NEEDS = {"text": "transformers", "images": "transformers", "graphs": "torch_geometric"}


def read_script(name):
    return (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture(params=make.NAMES)
def name(request):
    return request.param


@pytest.fixture
def cells(name):
    return json.loads((DOCS / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_a_notebook_holds_its_script_and_what_it_gave(name, cells):
    source = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert source == make.read_cells(read_script(name)), "run docs/notebooks/make.py"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(home|tmp|root|work|Users)/", json.dumps(outputs)), "a folder of a machine"


def test_a_script_is_thirty_lines(name):
    lines = [line for line in read_script(name).splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 30


@pytest.mark.timeout(600)  # with torch and transformers on a busy machine
def test_a_script_runs(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name], reason="the notebook is about it")
    monkeypatch.chdir(tmp_path)
    numbers = {"trials": 0, "seeds": 1, "steps": 2}
    text = read_script(name)
    for key, value in numbers.items():
        text, count = re.subn(rf'"{key}": \d+', f'"{key}": {value}', text)
        assert count == 1
    names = {"__name__": "notebook"}
    exec(compile(text, SCRIPTS / f"{name}.py", "exec"), names)
    trials = names["report"].rows("trials")
    assert {trial["method"] for trial in trials} == {"adamw", "muon", "recommended"}
    assert [trial["failure"] for trial in trials] == [None] * 3


def test_cells_are_cut_where_the_script_says():
    text = "# %% [markdown]\n# # Title\n#\n# words\n\n# %%\nx = 1\n\n\n# %%\nprint(x)\n"
    assert make.read_cells(text) == [
        ("markdown", "# Title\n\nwords"),
        ("code", "x = 1"),
        ("code", "print(x)"),
    ]


def test_colab_and_jupyter_find_what_they_need(name):
    notebook = json.loads(Path(DOCS / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    first = "".join(notebook["cells"][0]["source"])
    assert "%pip install" in first
    own = f"docs/tutorials/{name}.ipynb"
    links = re.findall(r"^\[\w+\]: (\S+)$", first, re.MULTILINE)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert links == [f"{colab}/blob/main/{own}", f"{repository}/raw/main/{own}"]
