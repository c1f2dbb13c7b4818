"""The keys of plywise in the state that an optimizer keeps of a parameter."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PREFIX = "plywise."

SCALES = f"{PREFIX}backward_scale"
"""What the keys of back-matching's measured values begin with (`plywise.engine.kept_scales`)."""


def find_tensors(own: Mapping[Any, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under keys that begin with ``prefix``, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in own.items()
        if isinstance(key, str) and key.startswith(prefix) and isinstance(value, Tensor)
    }


def remove_keys(own: dict[Any, Any], prefix: str) -> None:
    """Remove a layer's keys; the step and the name, which are the parameter's, stay."""
    shared = prefix + "step", prefix + "name"
    for key in [k for k in own if isinstance(k, str) and k.startswith(prefix) and k not in shared]:
        del own[key]


def is_of_rule(key: Any, rule_name: str) -> bool:
    """Return whether a key of a parameter's state belongs to a rule of this name."""
    return isinstance(key, str) and key.startswith((f"{PREFIX}{rule_name}.", f"{PREFIX}{rule_name}["))


def find_rule(key: Any) -> str:
    """Return the name of the rule that a key belongs to, or ""."""
    if not isinstance(key, str) or not key.startswith(PREFIX) or key.startswith(SCALES):
        return ""
    return key.removeprefix(PREFIX).partition(".")[0].partition("[")[0]
