"""The layers with a running state: those expected from torch's modules, and those seen in calls."""

from collections.abc import Iterable

import torch

from plywise.engine.sites import ParameterEntry, Part, Site
from plywise.engine.statistics.layer_handle import LayerHandle, find_bias_name


class KnownLayers:
    """Layers by name, and in the model's order.

    Args:
        entries: the model's parameters, in its order.

    Attributes:
        by_name: the layers known so far.
    """

    def __init__(self, entries: Iterable[ParameterEntry]) -> None:
        self.by_name: dict[str, LayerHandle] = {}
        self._places: dict[ParameterEntry, int] = {}
        self._sorted: list[LayerHandle] = []
        entries = list(entries)
        self._by_place = {(id(owner.module()), owner.key): e for e in entries for owner in e.owners}
        for place, entry in enumerate(entries):
            self._places[entry] = place
            if not entry.why_left and entry.expected and not entry.is_original:
                self._add(entry.weight_name, entry, None)

    def add_site(self, site: Site) -> bool:
        """Add a layer at its first call.

        Returns:
            Whether its gradient will be that of its weight: not so if the weight is computed, or if calls
            use the same numbers in several ways.
        """
        known = self.by_name.get(site.name)
        if known is not None and known.site is None:
            known.site = site
            self._note_shared_bias(site)
            return site.computed is None
        others = [layer.site for layer in self.of_weight(site.entry) if layer.site is not None]
        if known is None:
            expected = self.by_name.get(site.entry.weight_name)
            if expected is not None and expected.site is None:  # its parts are used apart
                del self.by_name[expected.name]
            self._add(site.name, site.entry, site)
            self._note_shared_bias(site)
        if site.computed is not None:
            return False
        return all(other.is_like(site) for other in others if _do_overlap(other, site))

    def _add(self, name: str, entry: ParameterEntry, site: Site | None) -> None:
        own_bias = self._by_place.get((id(entry.owners[0].module()), find_bias_name(entry)))
        layer = self.by_name[name] = LayerHandle(name, entry, site, own_bias)
        layer.shares_bias = own_bias is not None and not _list_owners(own_bias) <= _list_owners(entry)
        self._sorted.clear()

    def _note_shared_bias(self, site: Site) -> None:
        """Note if calls of several weights add one bias, whose gradient is then the sum over all of them."""
        bias = None if site.bias is None else site.bias()
        sites = [(layer, layer.site) for layer in self.by_name.values() if layer.site is not None]
        adding = [layer for layer, one in sites if one.bias is not None and one.bias() is bias]
        if bias is not None and len({id(layer.entry) for layer in adding}) > 1:
            for layer in adding:
                layer.shares_bias = True

    def of_weight(self, entry: ParameterEntry) -> list[LayerHandle]:
        """Return the layers that one parameter makes: one, or several if its parts are used apart."""
        return [layer for layer in self.by_name.values() if layer.entry is entry]

    def list_in_order(self) -> list[LayerHandle]:
        """Return the layers in the model's order, whatever the order of their first calls was."""
        if not self._sorted:
            self._sorted = sorted(self.by_name.values(), key=self._find_place)
        return self._sorted

    def _find_place(self, layer: LayerHandle) -> tuple[int, int, str]:
        part = None if layer.site is None else layer.site.part
        place = self._places.get(layer.entry, len(self._places))
        return place, 0 if part is None else part[0], "" if part is not None else layer.name


def _list_owners(entry: ParameterEntry) -> set[int]:
    return {id(owner.module()) for owner in entry.owners}


def _do_overlap(first: Site, second: Site) -> bool:
    """Return whether two ways of using a parameter have numbers of it in common."""
    if first.part is None or second.part is None:
        return True
    used = torch.zeros(max(_find_end(first.part), _find_end(second.part)), dtype=torch.bool, device="cpu")
    offset, shape, strides = first.part
    used.as_strided(shape, strides, offset).fill_(True)
    offset, shape, strides = second.part
    return bool(used.as_strided(shape, strides, offset).any())


def _find_end(part: Part) -> int:
    """Return the first place of the whole parameter behind a part."""
    offset, shape, strides = part
    return offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
