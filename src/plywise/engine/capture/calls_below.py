"""Captured calls below a node of autograd's graph, and which gradients the running backward needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plywise.engine.capture.captured_call import TappedCall, find_wanted, find_wanted_of_tap
from plywise.engine.capture.graph import walk_graph
from plywise.engine.passes import RecentPasses, find_pass
from plywise.errors import PlywiseError

REENTRANT = "CheckpointFunctionBackward"
"""Part of the name of a reentrant checkpoint's node, which hides the graph inside of it."""


def is_call(node: Any, responder: Any = None) -> bool:
    """Return whether a node is a captured call (of this responder, if one is given)."""
    site = getattr(node, "site", None)
    return site is not None and (responder is None or site.responder is responder)


def find_calls(start: Any, responder: Any, name: str) -> tuple[list[Any], list[Any]]:
    """Return the responder's captured calls below a node, and those of them with no other call below.

    Args:
        start: a node of autograd's graph; None where nothing is below.
        responder: whose calls.
        name: name of the layer from which the search starts, for the error's text.

    Raises:
        PlywiseError: a reentrant checkpoint hides a part of the graph.
    """
    calls, lowest = [], []
    reaches: dict[Any, bool] = {}  # for each node, whether there is a call at it or below
    stack = [(start, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            below = any(reaches[source] for source, _ in node.next_functions if source is not None)
            if is_call(node, responder):
                calls.append(node)
                if not below:
                    lowest.append(node)
                below = True
            reaches[node] = below
        elif node is not None and node not in reaches:
            if REENTRANT in type(node).__name__:
                raise PlywiseError(
                    f"Back-matching's rate needs the whole graph, but below layer {name!r} a reentrant "
                    "checkpoint hides a part of it. Use torch.utils.checkpoint with use_reentrant=False."
                )
            if getattr(node, "is_passed_once", False):
                raise PlywiseError(
                    f"Back-matching's rate sends random vectors through the graph below layer {name!r}, and "
                    "a selective checkpoint there lets nothing through twice. Leave out its context_fn."
                )
            reaches[node] = False
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions)
    return calls, lowest


def find_wanting(start: Any, responder: Any) -> Any:
    """Return a call at or below a node whose update the running backward wants; None if there is none.

    There is none where only gradients at inputs are asked for (``torch.autograd.grad(output, x)``), or where
    all weights below are frozen. Calls that were looked at in this backward are not looked at again.
    """
    task = find_pass()
    met: list[Any] = []
    for node in walk_graph(start, lambda node: getattr(node, "wants_none_in", None) == task):
        if REENTRANT in type(node).__name__:
            return node  # torch refuses it where only some gradients are asked for
        if is_call(node, responder):
            if wants_update(node):
                return node
            met.append(node)
    for node in met:
        node.wants_none_in = task
    return None


def wants_update(node: Any) -> bool:
    """Return whether the running backward wants the gradient of a captured call's weight or bias."""
    if type(node)._forward_cls is TappedCall:
        return any(find_wanted_of_tap(node))
    return any(find_wanted(node, 3)[1:])


def is_asked_for(source: Any) -> bool:
    """Return whether `torch.autograd.grad` was asked for this leaf's gradient, which skips its hooks."""
    if not hasattr(source, "variable"):
        return False
    try:
        torch._C._will_engine_execute_node(source)
    except RuntimeError:  # the engine does not answer for such leaves
        return True
    return False


def find_leaf_nodes(start: Any) -> list[Any]:
    """Return the nodes below a node that accumulate a leaf's gradient."""
    return [node for node in walk_graph(start) if hasattr(node, "variable")]


class PassSamples:
    """The samples of backward passes: those of the call that a pass met first, on top.

    A reentrant checkpoint runs its part of the forward in a backward pass, and then a pass of its own through
    it. That one belongs to the pass around it.
    """

    def __init__(self) -> None:
        self._known = RecentPasses[tuple[int, int]]()

    def count(self, node: Any, samples: int) -> tuple[int, bool]:
        """Return the number of samples of the running backward, and whether it began at this layer.

        Args:
            node: the call that the backward has come to.
            samples: the samples of that call.
        """
        task, own = find_pass(), id(node.site)
        if task not in self._known:
            outer = getattr(node, "made_in", task)
            known = self._known.get(outer, (samples, own))
            self._known[outer] = self._known[task] = known
        samples, topmost = self._known[task]
        return samples, topmost == own


_training: set[object] = set()


@contextmanager
def train_by_inputs() -> Iterator[None]:
    """Treat backward passes in the block as training, though they ask for gradients at inputs only.

    Then the rule's altered values are sent down: activation relaxation and interlocking pass them from block
    to block.
    """
    token = object()
    _training.add(token)
    try:
        yield
    finally:
        _training.remove(token)


class AlteredPasses:
    """The backward passes in which a rule sends other values down than gradients.

    Those are the passes that need updates of the rule. Passes that ask only for gradients at inputs get plain
    gradients.

    Args:
        responder: whose calls.
        refuse: called with a leaf that `torch.autograd.grad` asks for in such a pass; raises an error if its
            gradient would be wrong. Leaves whose gradient arrives in ``.grad`` have hooks for that.
    """

    def __init__(self, responder: Any, refuse: Callable[[Tensor], None]) -> None:
        self._responder = responder
        self._refuse = refuse
        self._tasks = RecentPasses[None]()

    def __contains__(self, task: int) -> bool:
        return task in self._tasks

    def enter(self, node: Any) -> bool:
        """Return whether the running backward, which has come to this node, sends altered values down."""
        task = find_pass()
        if task in self._tasks:
            return True
        if torch.is_grad_enabled():  # a backward that is differentiated itself has autograd's own values
            return False
        wanting = find_wanting(node, self._responder)
        if wanting is None and not _training:
            return False
        if wanting is not None and any(is_asked_for(source) for source, _ in wanting.next_functions):
            for leaf in filter(is_asked_for, find_leaf_nodes(node)):
                self._refuse(leaf.variable)
        self._tasks[task] = None
        return True

    def enter_apart(self, node: Any) -> bool:
        """Send altered values down in a backward of inputs; the weights' follows later (ZeroBubble)."""
        task = find_pass()
        if task not in self._tasks:
            for leaf in find_leaf_nodes(node):
                self._refuse(leaf.variable)
            self._tasks[task] = None
        return True
