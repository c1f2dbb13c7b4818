"""Processes for the pipeline's tests: started once, and never left behind."""

from collections.abc import Iterator

import pytest

from .crew import Crew


@pytest.fixture(scope="package")
def crew() -> Iterator[Crew]:
    """Four processes that do one job after another."""
    made = Crew()
    try:
        yield made
    finally:
        made.close()
