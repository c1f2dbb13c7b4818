"""The parameters of an optimizer, whatever its groups."""

from typing import Any

from torch.optim import Optimizer


def list_parameters(optimizer: Optimizer | None) -> list[Any]:
    """List the parameters of all groups, in order; none if the optimizer is gone."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]
