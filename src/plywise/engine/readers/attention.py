"""Captures the projections inside `F.multi_head_attention_forward`.

While a mode is on, torch gives this function to the mode first, and then runs its body with the mode off, so
the linear calls in it are not seen. If it were called again with the mode on, it would recurse without end.
So its own code runs with the mode on, but without its check for overrides.
"""

from types import FunctionType
from typing import Any

import torch.nn.functional as F

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.masked_rows import transpose_masks


def rebind(function: Any, **replacements: Any) -> Any:
    """Return a Python function with some of the names that it looks up replaced."""
    names = {**function.__globals__, **replacements}
    rebound = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


_attend = rebind(F.multi_head_attention_forward, has_torch_function=lambda tensors: False)


def read_attention(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Read ``F.multi_head_attention_forward`` with the calls inside it captured."""
    query = args[0] if args else kwargs["query"]
    with capture.reenter(), transpose_masks(query, capture.local.innermost):
        return _attend(*args, **kwargs)
