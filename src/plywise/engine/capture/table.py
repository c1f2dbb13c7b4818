"""Finds the parameter from which the weight of a call was made."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from plywise.engine.capture.graph import walk_graph
from plywise.engine.capture.odd_tensors import explain_type, explain_values, is_expanded
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.layouts import Layout
from plywise.engine.passes import find_pass
from plywise.engine.processes.followed_parameters import find_successors, follow_parameters, is_replaced
from plywise.engine.selection import explain_kind
from plywise.engine.sharding import keep_whole
from plywise.engine.sites import PLAIN_TYPES, ParameterEntry, Site, find_part, is_tracer

MOST_NODES = 64
"""Nodes of autograd's graph between a computed weight and its parameters, at most."""

COMPUTED = "its weight is computed (weight norm, pruning ...), and a statistic belongs to a parameter"

Collect = Callable[[nn.Module], list[ParameterEntry]]


class ParameterTable:
    """The parameters of one model that one rule may take, and the sites at which calls use them.

    Args:
        model: the model; known weakly.
        collect: makes the entries (`plywise.engine.selection.collect_parameters` with the user's choice).
        kinds: the kinds of maps that the rule takes.
        computed_too: whether the rule can act on a weight that is computed from parameters.
        computed_biases: whether a computed bias belongs to the problem of its layer.
        frozen_too: whether calls of frozen weights concern the rule, since it alters the gradient at inputs.
        add_site: called with each new site.
    """

    def __init__(
        self,
        model: nn.Module,
        collect: Collect,
        kinds: frozenset[str],
        computed_too: bool,
        computed_biases: bool,
        frozen_too: bool,
        add_site: Callable[[Site], None],
        responder: Any,
    ) -> None:
        self._model = weakref.ref(model)
        self._collect = collect
        self._kinds = kinds
        self._computed_too = computed_too
        self._computed_biases = computed_biases
        self._frozen_too = frozen_too
        self._add_site = add_site
        self._responder = responder
        self.entries = collect(model)
        self._by_id: dict[int, tuple[weakref.ref[Tensor], ParameterEntry]] = {}
        self._strangers: dict[int, weakref.ref[Tensor]] = {}
        self._sharded: list[ParameterEntry] = []
        # others were in their places since the last step; those that belong to the same layer, if known
        self.adopted: dict[ParameterEntry, list[ParameterEntry]] = {}
        self.on_begin: list[Callable[[], None]] = []
        self.on_refresh: Callable[[], None] | None = None
        self.on_replaced: Callable[[list[ParameterEntry]], None] | None = None
        self._index(model)
        self.follow(model)

    def _index(self, model: nn.Module) -> None:
        aliases = {key: value for key, value in self._by_id.items() if value[0]() is not None}
        self._by_id = {**aliases, **{id(e.parameter()): (e.parameter, e) for e in self.entries}}
        self._sharded = [e for e in self.entries if e.sharding is not None]
        self._by_place = {(id(owner.module()), owner.key): e for e in self.entries for owner in e.owners}
        self.unsettled = any(e.leave_next and not e.left for e in self.entries)

    def begin_pass(self) -> None:
        """Begin a forward: what was found during the last one takes effect now.

        This does not happen where a backward runs a part of the forward again (checkpointing), because that
        must repeat the forward exactly.
        """
        in_backward = find_pass() != -1
        if not in_backward and dist.is_available() and dist.is_initialized():
            model = self._model()
            if model is not None and any(map(is_replaced, self.entries)):
                self.follow(model)
        for prepare in self.on_begin:
            prepare()
        if self.unsettled and not in_backward:
            self.unsettled = False
            for entry in self.entries:
                entry.left = entry.left or entry.leave_next

    def follow(self, model: nn.Module) -> None:
        """Follow parameters that fully_shard has sharded or parallelize_module has spread."""
        replaced = follow_parameters(model, self.entries, not self._computed_too)
        moved = {id(old): entry.parameter for old, entry in replaced}
        for site in (site for entry in self.entries for site in entry.sites.values()):
            site.bias, site.adds = (moved.get(id(ref), ref) for ref in (site.bias, site.adds))
        self._index(model)
        if replaced and self.on_replaced is not None:
            self.on_replaced([entry for _, entry in replaced])

    def keep_whole(self) -> AbstractContextManager[None]:
        """Leave sharded parameters whole for a while, where backward would reshard them."""
        model = self._model()
        return keep_whole(model) if self._sharded and model is not None else nullcontext()

    # ---- from a call to its site -----------------------------------------------------------------

    def find_site(
        self,
        weight: Tensor,
        map_: LinearMap,
        layout: Layout,
        bias: Tensor | None,
        x: Tensor,
        innermost: nn.Module | None,
        by_role: bool = True,
    ) -> Site | None:
        """Return the site of a call, or None if autograd must do it alone.

        Args:
            weight: the tensor in the place of the weight.
            map_: how the call reads.
            layout: how its weight becomes canonical.
            bias: the tensor in the place of the bias.
            x: the call's input.
            innermost: the module that was entered last.
            by_role: whether only a weight can be in its place (not so in a product of two tensors).
        """
        is_odd = type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES
        if is_odd and (is_tracer(x) or is_tracer(weight)):
            return None
        known = self._by_id.get(id(weight))
        entry = known[1] if known is not None and known[0]() is weight else None
        is_whole, computed = entry is not None, False
        if entry is None:
            entry, computed = self._resolve(weight, innermost, by_role)
        if entry is None or not self._takes_use(entry, weight, map_.kind, bias):
            return None
        owner = innermost if len(entry.owners) > 1 or computed else None
        last = entry.last
        if is_whole and last is not None and last[0] is map_ and last[1] is layout and last[2] == id(owner):
            site = last[3]
        else:
            site = self._find_or_make(entry, weight, (map_, layout, owner), bias, computed)
            entry.last = (map_, layout, id(owner), site) if is_whole else None
        if is_odd:
            self.leave(entry, explain_type(x, weight))
        elif x.layout is not torch.strided or x.is_nested or weight.is_complex() or weight.is_quantized:
            self.leave(entry, explain_values(x, weight))
        elif not entry.rests:  # its first call may have shown that it rests
            return site
        return None

    def _takes_use(self, entry: ParameterEntry, weight: Tensor, kind: str, bias: Tensor | None) -> bool:
        """Return whether the rule takes such a use of a parameter; if it never can, leave the parameter."""
        if entry.excluded or entry.left or entry.rests or not weight.numel():
            return False
        if weight._base is not None and is_expanded(weight):
            self.leave(entry, "calls use an expanded view of it, which has each number several times")
            return False
        if kind not in self._kinds:
            self.leave(entry, f"calls use it as {kind!r}: {explain_kind(kind)}")
            return False
        return weight.requires_grad or (bias is not None and bias.requires_grad) or self._frozen_too

    def is_parameter(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter of the model, or a view of one."""
        base = tensor if tensor._base is None else tensor._base
        known = self._by_id.get(id(base))
        return known is not None and known[0]() is base

    def note_use(self, function: str, args: tuple[Any, ...], but_sites: bool = False) -> None:
        """Remember that a function has used parameters, or views of them, that have no site."""
        for value in args:
            if isinstance(value, list | tuple):
                self.note_use(function, tuple(value), but_sites)
            elif isinstance(value, Tensor):
                base = value if value._base is None else value._base
                if base.is_leaf and base.requires_grad:
                    entry = self._find_stand_in(base) or self._find_by_place(base, None)
                    if entry is not None and not entry.rests and not (but_sites and entry.sites):
                        entry.used_by.setdefault(function)

    def leave(self, entry: ParameterEntry, reason: str) -> None:
        """Leave a parameter to the optimizer from the next forward on; until then calls answer plainly."""
        if not entry.leave_next:
            entry.leave_next = reason
            self.unsettled = True

    def _find_or_make(
        self,
        entry: ParameterEntry,
        weight: Tensor,
        key: tuple[Any, ...],
        bias: Tensor | None,
        computed: bool,
    ) -> Site:
        parameter = entry.parameter()
        base = weight._base
        part = None if computed or base is None or parameter is None else find_part(weight, base)
        shape = weight.shape if computed else None
        whole = (*key[:2], None if key[2] is None else id(key[2]), part, shape)
        site = entry.sites.get(whole)
        if site is None:
            site = self._make_site(entry, key, part, shape)
            if bias is not None:
                self._note_bias(site, bias, weight)
            entry.sites[whole] = site
            self._add_site(site)
        elif bias is not None and site.adds is not None and site.adds() is None:  # it has been replaced
            self._note_bias(site, bias, weight)
        return site

    def _make_site(
        self,
        entry: ParameterEntry,
        key: tuple[Any, ...],
        part: Any,
        computed: torch.Size | None,
    ) -> Site:
        layer, module = entry.find_owner(key[2])
        name = entry.name_in(layer)
        if part is not None:
            parts = sum(site.part is not None for site in entry.sites.values())
            name += f"[{parts}]"
        site = Site(name, entry, key[0], key[1], self._responder, module)
        site.part, site.computed = part, computed
        if any(other.name == name and not other.is_like(site) for other in entry.sites.values()):
            site.name += f" ({'×'.join(map(str, computed)) if computed else key[1].name})"
        return site

    def _note_bias(self, site: Site, bias: Tensor, weight: Tensor) -> None:
        """Remember which parameter the calls of a site add."""
        base = bias if bias._base is None else bias._base
        known = self._find_stand_in(base)
        if known is None and base.is_leaf and base.requires_grad:  # by functional_call, or assign=True
            known = self._find_by_place(base, site.module)
        # an entry's own reference, by which `follow` knows it again
        site.adds = weakref.ref(base) if known is None else known.parameter
        site.bias_entry = known
        site.bias = site.adds if isinstance(bias, Parameter) else None
        if known is None and self._computed_biases:
            for source in self._find_sources(bias):
                if not source.sites and not source.expected:
                    source.computed_into = site.entry
        site.bias_shape = None if bias.dim() == 1 else bias.shape
        with torch.no_grad():  # torch also takes one number for all outputs
            site.has_whole_bias = bias.numel() == len(site.layout.to_canonical(weight))

    # ---- tensors that are not parameters known so far -----------------------------------------------

    def _resolve(
        self, weight: Tensor, innermost: nn.Module | None, by_role: bool
    ) -> tuple[ParameterEntry | None, bool]:
        """Find the entry behind a view, a replaced parameter or a computed weight; say if it is computed."""
        base = weight._base
        if base is not None:
            known = self._by_id.get(id(base))
            if known is not None and known[0]() is base:
                return known[1], False
        if weight.is_leaf or (base is not None and base.is_leaf):
            leaf = weight if base is None else base
            entry = self._find_stand_in(leaf)
            if entry is None and leaf.requires_grad:
                entry = self._find_by_place(leaf, innermost)
            return entry, False
        if not by_role:
            return None, False
        sources = self._find_sources(weight)
        entry = self._find_by_place(weight, innermost) if sources else None
        entry = entry or max(sources, key=_count_entries, default=None)
        if entry is None:
            return None, False
        for source in sources:
            if not self._computed_too:
                self.leave(source, COMPUTED)
            elif source is not entry:
                source.computed_into = entry
        return (entry, True) if self._computed_too else (None, False)

    def _find_stand_in(self, tensor: Tensor) -> ParameterEntry | None:
        """Find the entry of a parameter, or of a whole tensor that stands in its place under fully_shard."""
        for entry in self._sharded:
            whole = None if entry.sharding is None else entry.sharding.whole
            if whole is not None and id(whole) not in self._by_id:
                self._by_id[id(whole)] = (weakref.ref(whole), entry)
        known = self._by_id.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _find_by_place(self, tensor: Tensor, innermost: nn.Module | None) -> ParameterEntry | None:
        """Find the entry whose place in a module this tensor has now (FSDP, functional_call, a new layer)."""
        stranger = self._strangers.get(id(tensor))
        if stranger is not None and stranger() is tensor:
            return None
        model = self._model()
        for module in chain([innermost] if innermost is not None else [], model.modules() if model else []):
            for attribute, parameter in module._parameters.items():
                if parameter is tensor:
                    return self._adopt(module, attribute, tensor)
        if tensor.is_leaf:
            self._strangers[id(tensor)] = weakref.ref(tensor)
        return None

    def _adopt(self, module: nn.Module, attribute: str, tensor: Tensor) -> ParameterEntry | None:
        entry = self._by_place.get((id(module), attribute))
        model = self._model()
        if entry is None and model is not None:
            self.refresh(model)
            entry = self._by_place.get((id(module), attribute))
        if entry is not None and tensor.is_leaf:
            self._by_id[id(tensor)] = (weakref.ref(tensor), entry)
            if entry.parameter() is None:  # made on the meta device, and materialised
                entry.parameter = weakref.ref(tensor)
            elif entry.parameter() is not tensor:
                self.adopted.setdefault(entry, [])
        return entry

    def refresh(self, model: nn.Module) -> None:
        """Look for parameters that were added since."""
        self.follow(model)
        known = {id(e.parameter()): e for e in self.entries if e.parameter() is not None}
        found, collected = [], self._collect(model)
        present = {id(entry.parameter()) for entry in collected}
        for entry in collected:
            parameter = entry.parameter()
            old = None if parameter is None else known.get(id(parameter)) or self._find_stand_in(parameter)
            if old is not None and old.parameter() is parameter:
                old.follow_owners(entry)
            elif old is not None and id(old.parameter()) in present:  # they were tied, and are no longer
                old = None
            if old is None:
                replaced = self._by_place.get((id(entry.owners[0].module()), entry.key))
                entry.is_new = replaced is None
                if replaced is not None and replaced.parameter() is None:  # made on meta, and materialised
                    replaced.parameter, replaced.last = entry.parameter, None
                    old = replaced
            found.append(old or entry)
        self.adopted |= find_successors(self.entries, found)
        self.entries = found
        self._index(model)
        self.follow(model)
        if self.on_refresh is not None:
            self.on_refresh()

    def _find_sources(self, weight: Tensor) -> list[ParameterEntry]:
        """Return the parameters that a weight is computed from; none if anything but parameters is in it."""
        sources: list[ParameterEntry] = []
        for count, node in enumerate(walk_graph(weight.grad_fn), 1):
            if count > MOST_NODES or _may_be_layer(node):
                return []  # computed by another layer: an activation, not a weight
            variable = getattr(node, "variable", None)
            if variable is not None:
                known = self._find_stand_in(variable) or self._find_by_place(variable, None)
                if known is None:
                    return []
                sources.append(known)
        return [] if any(entry.excluded for entry in sources) else sources


def _may_be_layer(node: Any) -> bool:
    """Return whether a node may stand for calls of layers: ours, or torch's own (a checkpoint).

    Functions that users write do not count: they may round weights, or take their signs.
    """
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] in ("plywise", "torch")


def _count_entries(entry: ParameterEntry) -> int:
    parameter = entry.parameter()
    return 0 if parameter is None else parameter.numel()
