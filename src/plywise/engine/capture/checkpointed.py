"""Finds calls in checkpointed functions that backward runs again where no module enters the mode.

``checkpoint(self.block, x)`` runs a module again, whose hooks enter the mode as in the forward. A function
that uses a parameter by hand, ``checkpoint(lambda t: F.linear(t, self.weight), x)``, runs again without it.
Then torch finds that the call has saved other tensors than in the forward, and raises CheckpointError.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

REASON = (
    "it is used by hand in a checkpointed function, where the rule cannot see it when backward runs that "
    "function again: put the call into a module, and checkpoint that"
)

_find_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def is_run_again_by_hand(enters: Callable[[nn.Module], bool]) -> bool:
    """Return whether the call that runs now is in a checkpointed function, but in none of its modules.

    Args:
        enters: whether a module enters the mode when it runs.
    """
    if _find_hooks(True) is None:  # no checkpoint runs, nor anything else that changes how tensors are saved
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and enters(frame.f_locals["self"]):
            return False
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False
