"""The families of the coverage benchmark that need torch and transformers alone, for tests of the engine.

Their home is `benchmarks/coverage_families`. A test builds a model with ``family.build(seed)`` and computes
its loss with ``family.loss(model, seed)``; `find_obstacle` says whether transformers is missing.
"""

import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

sys.path.insert(0, BENCHMARKS)
try:
    from coverage_families import FAMILIES as ALL
    from coverage_families import Family
finally:
    sys.path.remove(BENCHMARKS)

FAMILIES: tuple[Family, ...] = tuple(f for f in ALL if f.package in (None, "transformers"))
"""Families in the order of their tables: plain torch first."""

PLAIN = tuple(f for f in FAMILIES if f.package is None)
"""Families of torch alone: quick to import and to run."""
