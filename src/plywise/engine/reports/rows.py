"""The rows of an explanation: one for each handled map, and one for the other parameters of a module."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plywise.engine.contract import RuleContract
from plywise.engine.explain import LayerRow, Size
from plywise.engine.health import Health
from plywise.engine.selection import explain_kind, predict_kind
from plywise.engine.sites import Owner, ParameterEntry, Site
from plywise.engine.statistics.layer_handle import find_bias_name, predict_canonical, predict_groups

UNSEEN = "no call of a linear map has been seen with it yet"


class Claim(NamedTuple):
    """What a row counts: its parameters that train, those that are frozen, and the keys of both."""

    trained: int = 0
    frozen: int = 0
    keys: tuple[str, ...] = ()


NONE = Claim()

LEFT = "left to the optimizer"
FROZEN = "left as it is"
NOT_TRAINED = "it is frozen (requires_grad is False)"
COMPUTED = "the weight is computed from it; the update goes on through autograd"
ADDING = {
    "linear",
    "bilinear",
    "addmm",
    "baddbmm",
    *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)),
}
PRODUCTS = {"matmul", "linalg_matmul", "mm", "bmm", "einsum", "tensordot", "inner"}
QUIET = {*ADDING, *PRODUCTS, "embedding", "embedding_bag"}
"""Functions that need no remark if they use a parameter beside a handled map."""


def make_rows(
    rule: RuleContract, entries: list[ParameterEntry], health: Health, batch_size: int
) -> list[LayerRow]:
    """Make one row for each map, in the model's order.

    Args:
        rule: the rule.
        entries: the model's parameters.
        health: counts of fallbacks and other events.
        batch_size: rows assumed for linear layers that have not seen a batch.
    """
    counted: set[int] = set()
    rows: list[tuple[int, LayerRow]] = []  # with the module's id
    biases = _find_biases(entries)
    lone = {id(bias) for added in biases.values() for bias in added}
    for entry in entries:
        for path, ref, _ in _find_unique_owners(entry):
            module = ref()
            if module is not None and id(entry) not in lone:
                added = biases.get(id(entry), [])
                found = _make_rows_of(rule, entry, path, module, health, batch_size, counted, added)
                rows += [(id(module), row) for row in found]
    for entry in entries:
        if id(entry) in lone and id(entry) not in counted:
            module, parameter = entry.owners[0].module(), entry.parameter()
            if _is_carried(entry) and module is not None and parameter is not None:
                row = _make_computed_row(rule, entry, module, parameter, health, counted)
            else:
                row = _make_left_row(entry, module, entry.layer, _explain_rest(entry), health, counted)
            rows.append((id(module), row))
    return _merge_left(rows)


def _merge_left(rows: list[tuple[int, LayerRow]]) -> list[LayerRow]:
    """Merge the rows of a module's parameters that are left for the same reason into one."""
    merged: list[tuple[int, LayerRow]] = []
    for module, row in rows:
        last = merged[-1][1] if merged and merged[-1][0] == module else None
        if last is None or row.handled or last.handled or row.reason != last.reason:
            merged.append((module, row))
            continue
        joined = replace(
            last,
            shape=f"{last.shape}, {row.shape}",
            parameters=last.parameters + row.parameters,
            frozen=last.frozen + row.frozen,
            events={**last.events, **row.events},
            keys=last.keys + row.keys,
        )
        merged[-1] = module, joined
    return [row for _, row in merged]


def _find_unique_owners(entry: ParameterEntry) -> list[Owner]:
    seen: dict[str, Owner] = {}
    for owner in entry.owners:
        seen.setdefault(owner.path, owner)
    return list(seen.values())


def _find_biases(entries: list[ParameterEntry]) -> dict[int, list[ParameterEntry]]:
    """Find the biases that handled maps add, by the id of the weight's entry; they get no extra row."""
    by_place = {(owner.path, e.attribute): e for e in entries for owner in e.owners}
    by_id = {id(e.parameter()): e for e in entries}
    found: dict[int, list[ParameterEntry]] = {}
    for entry in entries:
        if entry.why_left or entry.leave_next:
            continue
        added = [by_id.get(id(site.adds())) for site in entry.sites.values() if site.adds is not None]
        if not entry.sites and entry.expected and entry.attribute in ("weight", "in_proj_weight"):
            added = [by_place.get((owner.path, find_bias_name(entry))) for owner in entry.owners]
        # a weight that calls add as well (a row of it) has a row of its own, and so has what is left alone
        known = [bias for bias in dict.fromkeys(added) if bias is not None]
        found[id(entry)] = [bias for bias in known if not bias.sites and not (bias.excluded and bias.trains)]
    return found


def _make_rows_of(
    rule: RuleContract,
    entry: ParameterEntry,
    path: str,
    module: nn.Module,
    health: Health,
    batch_size: int,
    counted: set[int],
    biases: list[ParameterEntry],
) -> list[LayerRow]:
    name = entry.name_in(path)
    if any(site.computed for site in entry.sites.values()):
        name = entry.name
    parameter = entry.parameter()
    if _is_carried(entry):
        assert parameter is not None
        return [_make_computed_row(rule, entry, module, parameter, health, counted)]
    left = entry.why_left or entry.leave_next or _explain_use(entry)
    trains = any(_trains(one.parameter()) for one in (entry, *biases))
    if left or not (entry.sites or entry.expected) or parameter is None or not trains:
        alone = [entry, *biases] if not trains else [entry]
        tied = _explain_tie(entry, path)
        reasons = ((one, f"{tied}{_explain_rest(one)}") for one in alone)
        return [_make_left_row(one, module, path, reason, health, counted) for one, reason in reasons]
    sites = [s for s in entry.sites.values() if s.module is module or len(entry.owners) == 1]
    claimed = _claim([entry, *biases], counted)
    frozen = "" if parameter.requires_grad else " (of its bias: the weight is frozen)"
    if not sites:
        return [_make_unseen_row(rule, entry, name, module, parameter, frozen, health, batch_size, claimed)]
    rows = []
    for number, site in enumerate(sites):
        label = name if len(sites) == 1 else site.name
        rows.append(
            _make_site_row(rule, site, label, module, frozen, health, claimed if number == 0 else NONE)
        )
    return rows


def _explain_tie(entry: ParameterEntry, path: str) -> str:
    """Say of a later owner of a tied weight whose it is: the reason is about the first owner's kind."""
    first, ref, _ = entry.owners[0]
    reason = entry.why_left or ""
    if path == first or reason.startswith("its weight is"):
        return ""
    return f"its weight is tied with {first!r} ({type(ref()).__name__}), "


def _make_site_row(
    rule: RuleContract,
    site: Site,
    name: str,
    module: nn.Module,
    frozen: str,
    health: Health,
    claimed: Claim,
) -> LayerRow:
    weight, memory, cost = site.weight, None, None
    assert weight is not None
    if site.size is not None:
        flops, floats = rule.estimate_cost(site.size)
        memory, cost = floats * max(weight.element_size(), 4), flops / max(site.size.plain, 1.0)
    reason = "linear in its weights"
    if site.computed:
        reason = "its weight is computed; the update goes on through autograd"
    # such uses are how a weight is computed
    others = [] if site.computed else [name for name in site.entry.used_by if name not in QUIET]
    part = "of which it learns nothing" if rule.remembers else "whose part stays a plain gradient"
    notes = f"; also used by {', '.join(others)}, {part}" if others else ""
    if site.kept is not None:
        notes += f"; {site.kept[0]} of {site.kept[1]} rows counted in its last call"
    treatment, events = rule.describe(site.size) + frozen, health.of(site.name)
    row = _make_row(name, module, site.entry, claimed, treatment, reason + notes, events)
    shape = _format_shape(site.part[1] if site.part else weight.shape)
    return replace(row, shape=shape, memory=memory, cost=cost, passes=site.passes, size=site.size)


def _make_unseen_row(
    rule: RuleContract,
    entry: ParameterEntry,
    name: str,
    module: nn.Module,
    parameter: Tensor,
    frozen: str,
    health: Health,
    batch_size: int,
    claimed: Claim,
) -> LayerRow:
    """Make the row of a layer that has not been called yet."""
    memory, cost, size = None, None, None
    if not nn.parameter.is_lazy(parameter):
        size = _predict_size(entry, module, parameter, batch_size)
    if size is not None:
        flops, floats = rule.estimate_cost(size)
        memory, cost = floats * max(parameter.element_size(), 4), flops / size.plain
    treatment, reason = rule.describe(size) + frozen, "waits for its first batch"
    row = _make_row(name, module, entry, claimed, treatment, reason, health.of(name))
    return replace(row, memory=memory, cost=cost, size=size)


def _predict_size(
    entry: ParameterEntry, module: nn.Module, parameter: Tensor, batch_size: int
) -> Size | None:
    """Return the sizes of a linear layer's problem; None for others, which depend on their inputs."""
    if entry.expected != "linear" or parameter.dim() != 2:
        return None
    with torch.no_grad():
        canonical = predict_canonical(module, parameter)
    groups = predict_groups(module)
    columns = canonical[1:].numel() + (getattr(module, "bias", None) is not None)
    return Size(batch_size, columns, canonical[0] // groups, groups)


def _make_computed_row(
    rule: RuleContract,
    entry: ParameterEntry,
    module: nn.Module,
    parameter: Tensor,
    health: Health,
    counted: set[int],
) -> LayerRow:
    """Make the row of a parameter from which, with others, a handled weight is computed."""
    assert entry.computed_into is not None
    site = next(iter(entry.computed_into.sites.values()))
    claimed, treatment = _claim([entry], counted), rule.describe(site.size)
    row = _make_row(entry.name, module, entry, claimed, treatment, COMPUTED, health.of(entry.name))
    return replace(row, passes=site.passes)


def _make_left_row(
    entry: ParameterEntry,
    module: nn.Module | None,
    path: str,
    reason: str,
    health: Health,
    counted: set[int],
) -> LayerRow:
    name = entry.name_in(path)
    if not entry.name.endswith(entry.attribute):  # an original of a parametrization
        name = entry.name
    events = {**health.of(path), **health.of(entry.name)}
    treatment = LEFT if _trains(entry.parameter()) else FROZEN
    row = _make_row(name, module, entry, _claim([entry], counted), treatment, reason, events)
    return replace(row, handled=False)


def _make_row(
    name: str,
    module: nn.Module | None,
    entry: ParameterEntry,
    claimed: Claim,
    treatment: str,
    reason: str,
    events: dict[str, int],
) -> LayerRow:
    """Make the row of a handled parameter, with what all rows have."""
    parameter = entry.parameter()
    return LayerRow(
        name,
        type(module).__name__,
        "lazy" if parameter is None or nn.parameter.is_lazy(parameter) else _format_shape(parameter.shape),
        True,
        treatment,
        reason,
        events,
        parameters=claimed.trained,
        is_new=entry.is_new,
        keys=claimed.keys,
        frozen=claimed.frozen,
    )


def _format_shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _trains(parameter: Tensor | None) -> bool:
    """Return whether a parameter may change; true for one that is gone."""
    return parameter is None or parameter.requires_grad


def _is_carried(entry: ParameterEntry) -> bool:
    """Return whether a handled weight is computed from it, so that its gradient is the update, carried on."""
    into = entry.computed_into
    if into is None or entry.why_left or entry.leave_next or not entry.trains:
        return False
    return bool(into.sites) and not into.why_left and not into.leave_next


def _explain_rest(entry: ParameterEntry) -> str:
    if not _trains(entry.parameter()):
        return NOT_TRAINED
    why = entry.why_left or entry.leave_next or _explain_use(entry)
    if not why and entry.computed_into is not None:
        why = entry.computed_into.why_left or entry.computed_into.leave_next
    return why or UNSEEN


def _explain_use(entry: ParameterEntry) -> str:
    """Name the functions that use a weight which no captured call has used; "" if there are none."""
    if entry.sites or entry.computed_into is not None:
        return ""
    module, parameter = entry.owners[0].module(), entry.parameter()
    kind = "" if module is None or entry.attribute != "bias" else predict_kind(module, "weight")[0]
    if kind == "norm" and not entry.may_scale:
        return explain_kind(kind)  # as its weight, which the same calls use
    if not entry.used_by:
        return ""
    names = ", ".join(entry.used_by)
    if parameter is not None and parameter.dim() == 1 and set(entry.used_by) <= ADDING:
        return f"{names} adds it to the output of a weight that the rule leaves alone"
    if parameter is not None and parameter.dim() == 1 and set(entry.used_by) <= PRODUCTS:
        return f"it is used by {names} as a vector, and the rule takes matrices"
    return f"its weight is used by {names}, which is not read as a linear map"


def _claim(entries: list[ParameterEntry], counted: set[int]) -> Claim:
    """Claim those of these parameters that no row has counted yet."""
    trained, frozen, keys = 0, 0, []
    for entry in entries:
        parameter = entry.parameter()
        if id(entry) not in counted and parameter is not None:
            counted.add(id(entry))
            size = 0 if nn.parameter.is_lazy(parameter) else parameter.numel()
            trained += size if parameter.requires_grad else 0
            frozen += 0 if parameter.requires_grad else size
            keys.append(entry.name)
    return Claim(trained, frozen, tuple(keys))


def make_module_row(module: nn.Module, name: str, reason: str, events: dict[str, int]) -> LayerRow:
    """Make the row of a module that no rule handles."""
    owned = [p for p in module._parameters.values() if p is not None and not nn.parameter.is_lazy(p)]
    shape = ", ".join(_format_shape(p.shape) for p in owned[:2])
    count = sum(p.numel() for p in owned)
    return LayerRow(name, type(module).__name__, shape, False, LEFT, reason, events, parameters=count)
