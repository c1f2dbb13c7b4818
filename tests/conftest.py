"""One thread, one seed, who begins first, and the option that runs the contract on a user's own rule."""

import gc
import os
import signal
import sys

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

pytest.register_assert_rewrite("plywise.testing.contract")
torch.set_num_threads(1)
# background jobs of a shell ignore Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


BEGIN_WITH = (
    "cli/test_pipeline_command.py",
    "pipeline/test_faults.py",
    "docs/test_pages.py",
    "arena/test_ray_executor.py",
    "engine/test_sharded.py",
    "contract/test_scales.py",
    "contract/test_compile.py",
    "sweep/test_quick.py",
    "trainers/test_hugging_face.py",
    "engine/test_parallel.py",
    "engine/test_state_dicts.py",
    "contract/test_memory_ddp.py",
    "arena/test_interrupt.py",
    "test_power_cuts.py",
)
"""The files that take longest. A file runs in one process: at the end, all others would wait for it."""

TRAINERS = ("test_loggers.py", "engine/test_real_uses.py", "local/test_split_loops.py")
"""Files beside those in ``trainers/`` that import Lightning or transformers: for five seconds each time."""


def seed_cpu(seed: int) -> torch.Generator:
    """What `torch.manual_seed` does where the CPU is the only device."""
    return torch.default_generator.manual_seed(int(seed))


if not torch.accelerator.is_available():
    # it keeps the whole stack for each kind of device that might come: longer than many a test takes
    torch.manual_seed = seed_cpu


def pytest_xdist_auto_num_workers() -> int:
    """Two processes more than there are processors: some tests wait for processes of their own."""
    return (os.cpu_count() or 1) + 2


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """A file runs in one process, and so do all files that import Lightning or transformers."""
    return TrainersTogether(config, log)


class TrainersTogether(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "trainers" if "trainers/" in file or file.endswith(TRAINERS) else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(BEGIN_WITH))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plywise-rule",
        action="append",
        default=[],
        metavar="MODULE:FACTORY",
        help="run tests/contract on this rule instead of the built-in ones (see tests/contract/registry.py)",
    )
    parser.addoption(
        "--power-cuts",
        type=int,
        default=5,
        metavar="N",
        help="how many damages of each command's folder tests/test_power_cuts.py tries; 100 are all",
    )


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Stands in an empty folder; called with a name and a text, puts a module of the user's there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def _bytecode_of_the_project_alone() -> None:
    """Processes that tests start read the bytecode that is there, and write none in users' folders."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _brief_collections() -> None:
    """What is there by now stays: tests that collect garbage need not look through it again and again."""
    import torch._dynamo  # noqa: F401  (the first optimizer would: a tenth of a second more each collection)

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
