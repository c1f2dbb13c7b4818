"""Walks through autograd's graph."""

from collections.abc import Callable, Iterator
from typing import Any


def walk_graph(start: Any, skips: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Yield the nodes of autograd's graph at and below a node, each once.

    Args:
        start: the node; None where there is no graph.
        skips: whether a node is left out, and with it what is below it only.
    """
    seen: set[Any] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen or skips(node):
            continue
        seen.add(node)
        yield node
        stack.extend(source for source, _ in node.next_functions)
