"""What is uploaded: metadata, archives, and the files of the project that name versions and packages."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser

import pytest
import yaml
from trove_classifiers import classifiers

import plywise as pw
from benchmark_scripts import REPOSITORY

SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
WORKFLOWS = REPOSITORY / ".github" / "workflows"
LEFT_OUT = ("runs/", "dist/", ".venv/", "docs/_build/", "docs/generated/")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist, built from the working tree."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=REPOSITORY, check=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        return Parser().parsestr(wheel.read(f"plywise-{pw.__version__}.dist-info/METADATA").decode("utf-8"))


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    source = REPOSITORY / "src" / "plywise"
    files = {f"plywise/{path.relative_to(source).as_posix()}" for path in source.rglob("*") if path.is_file()}
    with zipfile.ZipFile(archives[0]) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if name.startswith(f"plywise-{pw.__version__}.dist-info/")}
    more = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].values()
    assert names - info == {name for name in files if "__pycache__" not in name} | set(more)
    assert {"plywise/py.typed", "plywise/__init__.pyi", "plywise/data/digits.npz"} <= names


def test_every_licence_file_is_in_the_wheel(archives):
    sources = REPOSITORY.rglob("*LICEN[SC]E*")
    kept = {
        path.relative_to(REPOSITORY).as_posix() for path in sources if not {".venv", "_build"} & {*path.parts}
    }
    assert "src/plywise/arena/reports/templates/vendor/uplot/LICENSE" in kept
    with zipfile.ZipFile(archives[0]) as wheel:
        names = wheel.namelist()
    assert {name.partition(".dist-info/licenses/")[2] for name in names if "/licenses/" in name} == kept


def test_the_sdist_can_be_tested_and_holds_no_results_of_a_run(archives):
    with tarfile.open(archives[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "CHANGELOG.md", "hatch_build.py", "tests/conftest.py", "docs/conf.py"} <= names
    assert not [name for name in names if name.startswith(LEFT_OUT)]


def test_the_sdist_holds_all_that_is_in_the_repository(archives):
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no repository of git")
    with tarfile.open(archives[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    there = {name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}
    assert there - names == set()


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_tree(archives, tmp_path):
    with tarfile.open(archives[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again"]
    subprocess.run(command, cwd=source, check=True)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert read_sums(again) == read_sums(archives[0])


CONTRACT = """
from dataclasses import dataclass

import plywise as pw
from plywise.testing import check_rule

@dataclass(frozen=True, eq=False)
class Half(pw.Rule):
    def update(self, call):
        return call.gradient().scaled(0.5, 0.5)

if __name__ == "__main__":
    print(pw.__file__)
    print(check_rule(Half, only=["errors", "shapes"]))
"""


def test_the_contract_comes_with_the_wheel(archives, tmp_path):
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "check_it.py").write_text(CONTRACT)
    settings = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "check_it.py"], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    first, *_, last = run.stdout.splitlines()
    assert first == str(tmp_path / "site" / "plywise" / "__init__.py")
    assert re.fullmatch(r"Half: [1-9]\d+ passed, 0 failed, \d+ left out\.", last)


def read_sums(wheel):
    """Names and checksums of the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {one.filename: one.CRC for one in archive.infolist()}


def test_the_long_description_has_only_absolute_links(metadata):
    text, readme = metadata.get_payload(), (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = LINK.findall(text)
    assert len(links) == len(LINK.findall(readme)) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    relative = {link.partition("#")[0] for link in LINK.findall(readme) if not link.startswith("https:")} - {
        ""
    }
    assert [link for link in relative if not (REPOSITORY / link).exists()] == []
    address = PROJECT["urls"]["Repository"]
    assert all(
        any(link.startswith(f"{address}/{way}/main/{one}") for link in links for way in ("blob", "raw"))
        for one in relative
    )


def test_metadata_say_what_the_files_say(metadata):
    assert metadata["Version"] == pw.__version__
    assert metadata["License-Expression"] == "MIT AND CC-BY-4.0"
    assert set(metadata.get_all("Classifier")) <= classifiers
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pw.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    for name in ("CONTRIBUTING.md", "conda/meta.yaml"):
        addresses = re.findall(r"https://\S+/plywise\b", (REPOSITORY / name).read_text(encoding="utf-8"))
        assert addresses
        assert all(one.startswith(PROJECT["urls"]["Repository"]) for one in addresses)


def test_the_extra_all_holds_all_that_users_may_want():
    extras = PROJECT["optional-dependencies"]
    inside = re.fullmatch(r"plywise\[(.*)\]", extras["all"][0])[1].split(",")
    assert set(inside) == set(extras) - {"all", "dev", "docs"}


def test_the_recipe_of_conda_asks_for_what_pip_asks_for():
    text = (REPOSITORY / "conda" / "meta.yaml").read_text(encoding="utf-8")
    plain = re.sub(r"\{\{ *(\w+) *\}\}", r"\1", re.sub(r"\{%.*?%\}\n?", "", text))
    recipe = yaml.safe_load(plain)
    wanted = {word.replace("torch>", "pytorch>") for word in PROJECT["dependencies"]}
    assert {
        word.replace(" ", "") for word in recipe["requirements"]["run"] if not word.startswith("python ")
    } == wanted
    assert f'version = "{pw.__version__}"' in text
    assert f"plywise = {PROJECT['scripts']['plywise']}\n" in text
    assert f">={PROJECT['requires-python'].removeprefix('>=')}" in text


def test_the_command_leads_to_a_function():
    module, _, name = PROJECT["scripts"]["plywise"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_ci_runs_what_the_classifiers_name():
    matrix = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    named = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert matrix["python"] == named
    assert f'requires-python = ">={named[0]}"' in (REPOSITORY / "pyproject.toml").read_text()
    lowest = next(word for word in PROJECT["dependencies"] if word.startswith("torch>=")).removeprefix(
        "torch>="
    )
    locked = re.search(r"TORCH_VERSION := (\S+)", (REPOSITORY / "Makefile").read_text())[1]
    assert matrix["torch"][:2] == [f"{lowest}.0", locked]
    for workflow in WORKFLOWS.glob("*.yml"):
        for build in re.findall(r'"torch==([\d.]+)', workflow.read_text()):
            assert build in matrix["torch"]
