"""Keeps torch.compile out of the code that acts for a rule.

A compiled optimizer step, or a whole training step in one compiled function, would otherwise lead the
compiler into our hooks and into a rule's own solves: a hundred graphs for three layers, compiled again and
again.
"""

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])

WHY_CALLS = (
    "plywise reads calls of linear maps between compiled graphs: leave fullgraph=True out, or the parameters "
    "in question to the optimizer, rule.attach(..., exclude=...)"
)
"""What torch.compile says where it must not end a graph in the forward."""

WHY_STEPS = "a rule of plywise acts between backward and the optimizer's step: leave fullgraph=True out"
"""What it says where it must not end a graph at the optimizer's step."""

_compiler = torch._C._dynamo.eval_frame


def leave_out(reason: str, with_calls: bool = True) -> Callable[[Function], Function]:
    """Make a decorator: torch.compile leaves the function out of its graphs, and gives the reason.

    torch.compiler.disable does this too, but imports torch._dynamo, which takes as long as importing torch,
    and adds a wrapper to each call. Here an eager call costs nothing.

    Args:
        reason: what torch.compile says if it must not end a graph.
        with_calls: whether the functions that this one calls are left out, too.
    """
    skip = _compiler._FrameAction.SKIP
    below = skip if with_calls else _compiler._FrameAction.DEFAULT

    def mark(function: Function) -> Function:
        assert isinstance(function, FunctionType)
        _compiler.set_code_exec_strategy(function.__code__, _compiler._FrameExecStrategy(skip, below))
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark
