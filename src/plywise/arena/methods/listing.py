"""Says for each method of plywise where it is in the arena: a method, a workload, or why it is neither."""

from plywise.errors import PlywiseError
from plywise.registry.names import NAMES

METHOD_OF = {entry.name: entry.method for entry in NAMES if entry.method}
"""The arena's method, by the name of what it is made of."""

WORKLOAD_OF = {entry.name: entry.workload for entry in NAMES if entry.workload}
"""The workload whose network it is."""

ELSEWHERE = {entry.name: entry.absence for entry in NAMES if entry.absence}
"""Why there is neither."""


def find_place(name: str) -> str:
    """Say in a sentence where an entry of the registry is in the arena.

    Raises:
        PlywiseError: nothing is known of it.

    Example:
        >>> find_place("Foof")
        'The method foof: plywise bench --workloads quick --methods sgd,foof'
        >>> find_place("VSML")
        'The network of a workload: plywise bench --workloads vsml-episodes'
    """
    if name in METHOD_OF:
        method = METHOD_OF[name]
        where = "digits-rare" if name in ("AUCMargin", "CoDA") else "quick"
        return f"The method {method}: plywise bench --workloads {where} --methods sgd,{method}"
    if name in WORKLOAD_OF:
        return f"The network of a workload: plywise bench --workloads {WORKLOAD_OF[name]}"
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    raise PlywiseError(f"The table plywise.registry.names does not say where {name} is in the arena.")
