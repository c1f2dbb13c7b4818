"""One thread, one seed, and the option that runs the contract on a user's own rule."""

import signal

import pytest
import torch

torch.set_num_threads(1)
# background jobs of a shell ignore Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plywise-rule",
        action="append",
        default=[],
        metavar="MODULE:FACTORY",
        help="run tests/contract on this rule instead of the built-in ones (see tests/contract/registry.py)",
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
