"""Makes the tutorials that are notebooks: runs each NAME.py here, and writes docs/tutorials/NAME.ipynb.

    python docs/notebooks/make.py           # all
    python docs/notebooks/make.py graphs    # some

A script is cut at lines that begin with ``# %%``; ``# %% [markdown]`` begins a cell of text. A notebook whose
code is that of the script already keeps its output, and gets the new text; delete it to run it again. The
documentation shows the notebooks as they are: it does not run them.
"""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TUTORIALS = HERE.parent / "tutorials"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "make")


def read_cells(text: str) -> list[tuple[str, str]]:
    r"""The cells of a script: ``"markdown"`` or ``"code"``, and the text of each.

    Example:
        >>> read_cells("# %% [markdown]\n# # Title\n\n# %%\nprint(1)\n")
        [('markdown', '# Title'), ('code', 'print(1)')]
    """
    cells = []
    for part in f"\n{text}".split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip()))
    return cells


def build_notebook(name: str):
    """The notebook of a script, not executed."""
    import nbformat

    cells = []
    for number, (kind, source) in enumerate(read_cells((HERE / f"{name}.py").read_text(encoding="utf-8"))):
        cell = getattr(nbformat.v4, f"new_{kind}_cell")(source)
        cell["id"] = f"{name}-{number}"  # random ids would change with every run
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def list_code(notebook) -> list:
    """The cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook) -> None:
    """Run a notebook in an empty folder."""
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = str(HERE.parents[1] / "src")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm asks for a progress bar that nobody needs here
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook["cells"]:
        cell["metadata"].clear()  # when each cell ran


def keep_output(notebook, path: Path) -> bool:
    """Take the output from an earlier notebook of the same code; whether there is one."""
    import nbformat

    before = list_code(nbformat.read(path, as_version=4)) if path.exists() else []
    code = list_code(notebook)
    if [cell["source"] for cell in before] != [cell["source"] for cell in code]:
        return False
    for new, old in zip(code, before, strict=True):
        new["outputs"], new["execution_count"] = old["outputs"], old["execution_count"]
    return True


def main() -> None:
    """Make the notebooks named on the command line, or all."""
    import nbformat

    for name in sys.argv[1:] or NAMES:
        notebook, path = build_notebook(name), TUTORIALS / f"{name}.ipynb"
        if not keep_output(notebook, path):
            execute(notebook)
        notebook["metadata"]["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
