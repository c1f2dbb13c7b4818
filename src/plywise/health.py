"""Old address of `plywise.engine.health`."""

from plywise.engine.health import EIGENVALUES, FLOAT64, IDENTITY, NON_FINITE, SKIPPED, Health

__all__ = ["EIGENVALUES", "FLOAT64", "IDENTITY", "NON_FINITE", "SKIPPED", "Health"]
