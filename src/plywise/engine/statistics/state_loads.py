"""Follows an optimizer's state dicts for one attachment of any rule, with statistics or without."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.statistics.state_dicts import refuse_orphans


def follow_state_dicts(optimizer: Optimizer, look: Callable[[], None]) -> list[RemovableHandle]:
    """Look for new groups before a state is saved or loaded; refuse loaded statistics that have no rule.

    A group that was added since the last step belongs to the rule already when its state comes. Whether a
    loaded statistic has a rule is seen at the next step: until then, another rule may be attached.

    Args:
        optimizer: the optimizer.
        look: finds out which parameters the optimizer steps now.
    """
    is_new = True  # a state may have been loaded before attach

    def look_before_saving(optimizer: Optimizer) -> None:
        look()

    def look_before_loading(optimizer: Optimizer, state: dict[str, Any]) -> None:
        look()

    def note_load(optimizer: Optimizer) -> None:
        nonlocal is_new
        is_new = True

    @leave_out(WHY_STEPS)
    def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_new
        if is_new:
            refuse_orphans(optimizer)
            is_new = False

    return [
        optimizer.register_state_dict_pre_hook(look_before_saving, prepend=True),
        optimizer.register_load_state_dict_pre_hook(look_before_loading, prepend=True),
        optimizer.register_load_state_dict_post_hook(note_load),
        optimizer.register_step_pre_hook(check),
    ]
