"""A user's folder is searched last: no file in it hides a package that plywise needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import torch
from torch import nn

def model(): return nn.Linear(4, 3)
def data(): return torch.randn(40, 4), torch.arange(40) % 3
"""
TRAP = "open('imported', 'a').write(__name__)\nraise ImportError('the file of the user, not the package')\n"
PACKAGES = ("jinja2", "rich", "cyclopts", "filelock", "matplotlib", "pytorch_optimizer", "sympy")
BENCH = ("--methods", "sgd", "--trials", "0", "--seeds", "1", "--steps", "2", "--out", "there")
PLYWISE = {
    "command": [sys.executable, "-c", "import sys; sys.path.pop(0); from plywise.cli import main; main()"],
    "module": [sys.executable, "-m", "plywise"],
}
WORDS = {"command": ["diagnose"], "module": ["bench", *BENCH]}


@pytest.mark.parametrize("how", PLYWISE)
def test_files_called_like_packages_are_not_imported(tmp_path, how):
    """A bench runs by ``-m``, whose path starts with the user's folder; a diagnosis by the command."""
    (tmp_path / "mine.py").write_text(MODULE)
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(TRAP)
    source = os.pathsep.join([*filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    done = subprocess.run(
        [*PLYWISE[how], *WORDS[how], "mine:model", "--data", "mine:data"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source} if source else None,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert how == "command" or (tmp_path / "there" / "report.html").exists()
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_a_module_that_an_installed_one_hides_is_named(plywise, user_module, tmp_path):
    user_module("filelock", MODULE)
    sys.path.remove(str(tmp_path))
    code, _, err = plywise("diagnose", "filelock:model", "--data", "filelock:data")
    assert code == 1
    assert "filelock.py has the name of an installed module" in err
    assert "give yours another name" in err


def test_modules_of_the_folder_are_found_and_it_comes_last(plywise, user_module, tmp_path):
    user_module("mine", MODULE)
    sys.path.remove(str(tmp_path))
    assert plywise("diagnose", "mine:model", "--data", "mine:data").code == 0
    assert Path(sys.path[-1]) == tmp_path
