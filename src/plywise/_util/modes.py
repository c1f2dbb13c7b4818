"""Temporary changes of train and eval mode. A test forbids them anywhere else in plywise."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode in the block; afterwards every module is in its earlier mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """Find modules in eval mode within modules in train mode, as frozen batch norms are.

    ``module`` itself does not count: a model that was just loaded is in eval mode as a whole.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> frozen_parts(nn.Sequential(body)) == [body[1]]
        True
    """
    owners = [part for part in module.modules() if part.training and part is not module]
    roots = [child for owner in owners for child in owner.children() if not child.training]
    return list(dict.fromkeys(part for root in roots for part in root.modules() if not part.training))
