"""Comparisons: methods, workloads, and what trains, scores and reports.

From Python there are three functions::

    report = plywise.arena.bench(make_model, (x, y), methods=["adamw", "muon", "foof+adamw"])
    plywise.arena.load("runs/bench")        # what a bench has kept
    plywise.arena.diagnose(make_model, (x, y))

They are loaded on first use, so that names of methods and workloads cost no import of torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a type checker would take any name
    from plywise.arena.public import bench as bench
    from plywise.arena.public import diagnose as diagnose
    from plywise.arena.public import load as load
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'plywise.arena' has no attribute {name!r}")
        from plywise.arena import public

        return getattr(public, name)


__all__ = ["bench", "diagnose", "load"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
