"""Build wheel and sdist, and use them as a stranger would: in a fresh environment, away from the repository.

    python .ci/package.py                                     # writes dist/*.whl and dist/*.tar.gz
    python .ci/package.py --torch torch==2.13.0+cpu           # another build of torch
    python .ci/package.py --torch torch==2.9.0 --tests rules  # some tests on it besides

What is checked: the metadata and the long description (twine), that both archives give the same wheel, `pip
check`, a smoke run, and a user's script under mypy and pyright, in which `plywise.Nope` must be an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DIST = REPOSITORY / "dist"
TORCH = "torch==2.13.0" + ("+cpu" if sys.platform == "linux" and not shutil.which("nvidia-smi") else "")

SMOKE = """
import torch, plywise as pw
from pathlib import Path

assert "site-packages" in pw.__file__, pw.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rule = pw.ProxProp(tau=1.0).attach(model, optimizer)
x, y = torch.randn(64, 8), torch.arange(64) % 2
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(rule.explain())
rule.detach()
learner = pw.LocalLoss(
    pw.split(model, 2, x), num_classes=2, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-3)
)
learner.step(x, y)
print(torch.__version__, pw.__version__, f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
"""

TYPED = """
import torch
import plywise as pw
from typing_extensions import assert_type

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
rule = pw.ProxProp(tau=1.0).attach(model, optimizer)
assert_type(rule, pw.ProxProp)
health: object = rule.health
optimizers: list[type[torch.optim.Optimizer]] = [pw.optim.Muon, pw.optim.SOAP]
"""

UNTYPED = """
import plywise as pw

pw.Nope
pw.arena.Nope
pw.ProxProp(tua=1.0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", default=TORCH, help="what pip installs first (default: %(default)s)")
    parser.add_argument("--tag", help="of a release; must be v and the version")
    parser.add_argument("--tests", nargs="*", default=[], help="files and folders of tests/ to run besides")
    parser.add_argument("--no-types", action="store_true", help="leave mypy and pyright out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plywise-package-") as folder:
        work = Path(folder)
        wheel = build(work, options.tag)
        python = make_environment(work / "user", options.torch, str(wheel))
        use(python, work)
        if not options.no_types:
            check_types(python, work)
        if options.tests:
            run_tests(python, options.tests)
    print("The packages are good.")


def build(work: Path, tag: str | None) -> Path:
    """Build both archives into dist/ and check them; returns the wheel's path."""
    python = make_environment(work / "builder", "build", "twine")
    for old in (*DIST.glob("*.whl"), *DIST.glob("*.tar.gz")):
        old.unlink()
    run([python, "-m", "build", "--sdist", "--wheel", "--outdir", DIST, REPOSITORY])
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run([python, "-m", "twine", "check", "--strict", wheel, sdist])
    run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work / "again", sdist])
    (again,) = (work / "again").glob("*.whl")
    if contents(wheel) != contents(again):
        sys.exit(f"The wheel from the sdist differs: {contents(wheel) ^ contents(again)}")
    version = wheel.name.split("-")[1]
    if tag is not None and tag != f"v{version}":
        sys.exit(f"The tag is {tag}, the version {version}.")
    return wheel


def contents(wheel: Path) -> set[tuple[str, int]]:
    """Names and checksums of the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {(one.filename, one.CRC) for one in archive.infolist()}


def make_environment(folder: Path, *packages: str) -> Path:
    """Make a virtual environment with some packages, installed one after another; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    for package in packages:
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package])
    return python


def use(python: Path, work: Path) -> None:
    """Check what pip has installed, and run it."""
    run([python, "-m", "pip", "check"])
    run([python, "-c", SMOKE], work)
    for words in (["--version"], ["help"], ["methods"], ["doctor"], ["demo", "--seeds", "1", "--no-open"]):
        run([python, "-m", "plywise", *words], work)


def check_types(python: Path, work: Path) -> None:
    """Run mypy and pyright on a user's scripts: one without an error, one with three."""
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "mypy", "pyright"])
    good, bad = work / "typed.py", work / "untyped.py"
    good.write_text(TYPED)
    bad.write_text(UNTYPED)
    for checker in (["mypy", "--strict"], ["pyright", "--pythonpath", python]):
        run([python, "-m", *checker, good], work)
        found = subprocess.run([python, "-m", *checker, bad], cwd=work, capture_output=True, text=True)
        print(found.stdout)
        if found.returncode != 1 or found.stdout.count("Nope") != 2 or "tua" not in found.stdout:
            sys.exit(f"{checker[0]} does not see that plywise has no Nope, or that ProxProp has no tua.")


def run_tests(python: Path, names: list[str]) -> None:
    """Run tests on the installed package."""
    packages = ["pytest", "pytest-timeout", "hypothesis"]
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
    run([python, "-m", "pytest", "-q", *(REPOSITORY / "tests" / name for name in names)])


def run(command: list[str | Path], folder: Path | None = None) -> None:
    """Run a command, or exit with what went wrong."""
    print("$", *(str(word) if len(str(word)) < 100 else "..." for word in command), flush=True)
    if subprocess.run(command, cwd=folder).returncode:
        sys.exit("This command failed.")


if __name__ == "__main__":
    main()
