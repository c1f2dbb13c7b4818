"""Train and eval mode of modules. Nothing else in plywise switches a model for a while: a test forbids it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """Parts that their owner holds in eval mode within something in train mode, as batch norms often are.

    What stands directly in ``module`` is none: a model as a whole is in eval mode where it was just loaded.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> frozen_parts(nn.Sequential(body)) == [body[1]]
        True
    """
    owners = [part for part in module.modules() if part.training and part is not module]
    roots = [child for owner in owners for child in owner.children() if not child.training]
    return list(dict.fromkeys(part for root in roots for part in root.modules() if not part.training))
