"""Entries follow the parameters that `fully_shard` or `parallelize_module` has put in the place of theirs."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise.engine.sharding import Sharding, find_shards, is_spread
from plywise.engine.sites import Owner, ParameterEntry
from plywise.errors import AttachError

SPREAD = (
    "its weight is spread over processes (a DTensor, by tensor parallelism or by fully_shard of a module "
    "around this model): a rule needs the whole weight"
)
"""Why a DTensor is left to the optimizer."""


def find_replaced(entry: ParameterEntry) -> Owner | None:
    """Find an owner that has another tensor in the parameter's place now, and not just while it runs."""
    parameter = entry.parameter()
    whole = None if entry.sharding is None else entry.sharding.whole
    for owner in entry.owners:
        current = owner.find()
        if current is not None and current is not parameter and current is not whole:
            return owner
    return None


def find_in_place(entry: ParameterEntry) -> Tensor | None:
    """Return what is in the parameter's place now: another tensor, if it has been replaced anywhere."""
    owner = find_replaced(entry)
    return entry.parameter() if owner is None else owner.find()


def is_replaced(entry: ParameterEntry) -> bool:
    """Return whether another tensor is in the parameter's place now, and not just while its module runs."""
    return find_replaced(entry) is not None


def follow_parameters(
    model: nn.Module, entries: list[ParameterEntry], remembers: bool
) -> list[tuple[weakref.ref[Tensor], ParameterEntry]]:
    """Let entries follow their parameters after fully_shard or parallelize_module.

    What the rule cannot handle is marked as left to the optimizer, with the reason.

    Args:
        model: the model.
        entries: its parameters.
        remembers: whether the rule acts at the optimizer's step.

    Returns:
        The entries whose parameter has been replaced, each after the reference to the old one.
    """
    shards = find_shards(model)
    replaced = []
    mesh = None
    for entry in entries:
        module, name = entry.owners[0].module(), entry.key
        source = shards.get((id(module), name))
        parameter = source.sharded_param if source is not None else _find_spread(module, name)
        if parameter is None:
            continue
        if parameter is not entry.parameter():
            replaced.append((entry.parameter, entry))
            entry.parameter = weakref.ref(parameter)
            entry.sharding = None
        why = _explain_spread(parameter, source, mesh, remembers)
        entry.excluded = entry.excluded or why
        if not why:
            mesh = parameter.device_mesh
            if entry.sharding is None:
                entry.sharding = Sharding(source)
    return replaced


def refuse_old_optimizer(title: str, replaced: list[ParameterEntry], optimizer: Optimizer | None) -> None:
    """Raise AttachError unless the optimizer given to attach() steps what has replaced the parameters.

    Args:
        title: the rule and the model.
        replaced: the parameters that have been replaced.
        optimizer: the optimizer; None if it is gone.
    """
    stepped = set(map(id, list_parameters(optimizer)))
    if not any(id(entry.parameter()) in stepped for entry in replaced):
        raise AttachError(
            f"{title}: fully_shard or parallelize_module has replaced {replaced[0].name!r} and other "
            "parameters after attach(), and the optimizer given to attach() does not step the new ones. "
            "Spread the model first, then make the optimizer, then attach the rule to both.",
            see="attach-optimizer",
        )


def explain_replaced(name: str) -> str:
    """Say that the weight of a layer is another one than the rule was attached to, and what helps."""
    return (
        f"The weight of layer {name!r} is not the parameter that the rule was attached to, or not where it "
        "was (by load_state_dict(assign=True), a new layer, a parametrization, pruning?). Make such changes "
        "first, then the optimizer from the model's parameters, and attach the rule to both."
    )


def find_successors(
    before: list[ParameterEntry], found: list[ParameterEntry]
) -> dict[ParameterEntry, list[ParameterEntry]]:
    """Find the parameters that are not in the model any more, each with the new ones of its layer.

    A layer has new ones if it has been replaced, or if its weight is now computed from others.

    Args:
        before: the model's parameters so far.
        found: those that it has now.
    """
    known, kept = set(before), set(found)
    new = [entry for entry in found if entry not in known]
    pairs = {
        entry: [other for other in new if other.layer == entry.layer] for entry in before if entry not in kept
    }
    return {entry: others for entry, others in pairs.items() if others}


def refuse_replaced(
    entries: Mapping[ParameterEntry, list[ParameterEntry]], optimizer: Optimizer, keeps_values: bool
) -> None:
    """Raise AttachError if the optimizer steps old parameters, and the model has got others since.

    Args:
        entries: those in whose places others have been seen, perhaps only while a module ran; with the new
            parameters of the same layer, if they are not in the same place.
        optimizer: the optimizer.
        keeps_values: whether the rule keeps values beside the old parameters.
    """
    stepped = set(map(id, list_parameters(optimizer)))
    for entry, successors in entries.items():
        is_replaced_here = is_replaced(entry) and (keeps_values or id(find_in_place(entry)) not in stepped)
        trains_others = any(_is_lost(other, stepped) for other in successors)
        is_old_stepped = keeps_values or id(entry.parameter()) in stepped
        if not entry.why_left and is_old_stepped and (is_replaced_here or trains_others):
            owner = find_replaced(entry)
            raise AttachError(
                explain_replaced(entry.layer if owner is None else owner.path), see="attach-optimizer"
            )


def _is_lost(entry: ParameterEntry, stepped: set[int]) -> bool:
    """Return whether a parameter has a gradient that no step of the optimizer uses."""
    parameter = entry.parameter()
    return parameter is not None and parameter.grad is not None and id(parameter) not in stepped


def _find_spread(module: nn.Module | None, name: str) -> Any:
    parameter = None if module is None else module._parameters.get(name)
    return parameter if is_spread(parameter) else None


def _explain_spread(parameter: Any, source: Any, mesh: Any, remembers: bool) -> str:
    """Return why a parameter that is spread over processes is left to the optimizer, or ""."""
    if source is None:
        return SPREAD
    if source.is_dtensor:
        return "its weight is spread twice: by tensor parallelism and by fully_shard"
    if parameter.device_mesh.ndim != 1 or not hasattr(parameter.placements[0], "dim"):
        return "fully_shard keeps its weight on a mesh of several dimensions (HSDP), or replicates it"
    if mesh is not None and parameter.device_mesh != mesh:
        return "fully_shard keeps its weight on other processes than those of the layers before it"
    if remembers and source.offload_to_cpu:
        return "fully_shard offloads its gradient, away from the statistics (CPUOffloadPolicy)"
    return ""
