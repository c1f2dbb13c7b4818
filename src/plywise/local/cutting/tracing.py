"""Traces models by torch.fx, valid in train and in eval mode, or finds the reason why it cannot."""

import operator
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

FLAG = "_is_training"
"""The name under which a `TrainingFlag` sits in a graph's module."""


class StaysWholeError(Exception):
    """A module is not opened; the message says why."""


def trace(model: nn.Module, opened: set[nn.Module]) -> fx.Graph:
    """Return the graph of a model's forward on one input, valid in train and in eval mode.

    Args:
        model: the model; it stays as it is.
        opened: modules whose operations the graph holds, the model among them; others are single nodes.

    Raises:
        StaysWholeError: torch.fx cannot trace it, or the graph would not do what the model does.
    """
    train, evaluate = (_trace_mode(model, opened, training) for training in (True, False))
    _merge_modes(train, evaluate)
    _place_constants(train)
    return train


class TrainingFlag(nn.Module):
    """Says whether its block is in training: what ``self.training`` was in a forward that became a graph."""

    def forward(self) -> bool:
        """Return the mode."""
        return self.training


class ChainTracer(fx.Tracer):
    """A tracer that opens given modules only, and fails where a graph would not do what the module does."""

    proxy_buffer_attributes = True  # what is done to a buffer in place must be an operation of the graph

    def __init__(self, opened: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self._opened = opened
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is a leaf, except those to be opened."""
        return m not in self._opened

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Return one input; further arguments take their defaults, as they do in ``model(x)``."""
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def create_arg(self, a: Any) -> Any:
        """Refuse tensors that the graph would keep as they were while traced."""
        known = isinstance(a, nn.Parameter) or a.__class__ is not Tensor or a in self.tensor_attrs
        if not known and not any(a is buffer for buffer in self.root.buffers()):
            raise StaysWholeError(
                "its forward makes a tensor from no input, which a trace would freeze (make it a buffer)"
            )
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse operations under a context that the graph would not have."""
        if _modes() != self._modes:
            raise StaysWholeError("its forward switches autograd or autocast, which a trace does not see")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _trace_mode(model: nn.Module, opened: set[nn.Module], training: bool) -> fx.Graph:
    with _keep_untouched(opened), torch.enable_grad():
        for module in opened:
            module.training = training
        try:
            return ChainTracer(opened).trace(model)
        except StaysWholeError as error:
            raise StaysWholeError(f"{error}{_place(error)}") from None
        except Exception as error:
            raise StaysWholeError(f"torch.fx cannot trace it: {error}{_place(error)}") from error


@contextmanager
def _keep_untouched(modules: Collection[nn.Module]) -> Iterator[None]:
    """Puts attributes and buffers back, and refuses modules whose forward sets any."""
    stores: list[dict[str, Any]] = [store for m in modules for store in (vars(m), m._buffers)]
    before = [dict(store) for store in stores]
    changed: set[str] = set()
    try:
        yield
    finally:
        for store, old in zip(stores, before, strict=True):
            keys = store.keys() | old.keys()
            changed |= {key for key in keys if key not in store or store[key] is not old.get(key)}
            store.clear()
            store.update(old)
    if changed := changed - {"training"}:
        raise StaysWholeError(f"its forward sets the attribute {min(changed)!r}, which a graph would not")


def _place(error: Exception) -> str:
    """Return where in the user's code an error arose."""
    ours = (str(Path(torch.__file__).parent), __file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(ours):
            return f" (at {frame.line!r}, line {frame.lineno} of {Path(frame.filename).name})"
    return ""


def _merge_modes(train: fx.Graph, evaluate: fx.Graph) -> None:
    """Put a `TrainingFlag` into the training graph wherever True and False are ``self.training``."""
    reason = "its forward does different things in train and in eval mode"
    if len(train.nodes) != len(evaluate.nodes):
        raise StaysWholeError(reason)
    twins: dict[Any, fx.Node] = {}
    for node, twin in zip(list(train.nodes), evaluate.nodes, strict=True):
        twins[twin] = node
        leaves, others = _leaves(node), _leaves(twin)
        if (node.op, node.target, len(leaves)) != (twin.op, twin.target, len(others)):
            raise StaysWholeError(f"{reason}, at {node.name!r}")
        for number, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
            same = twins[other] if isinstance(other, fx.Node) else other
            if leaf is same or (type(leaf) is type(same) and leaf == same):
                continue
            if type(leaf) is not bool or type(same) is not bool:
                raise StaysWholeError(f"{reason}, at {node.name!r}")
            with train.inserting_before(node):
                flag = train.call_module(FLAG)
                leaves[number] = flag if leaf else train.call_function(operator.not_, (flag,))
        put: Callable[[Any], Any] = partial(_take_next, iter(leaves))
        node.args = fx.node.map_aggregate(node.args, put)
        node.kwargs = fx.node.map_aggregate(node.kwargs, put)


def _take_next(values: Iterator[Any], _: object) -> Any:
    return next(values)


def _leaves(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return found


def _place_constants(graph: fx.Graph) -> None:
    """Read parameters and buffers right where they are used, so that they do not cross."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.get_attr(str(node.target)))
        graph.erase_node(node)
