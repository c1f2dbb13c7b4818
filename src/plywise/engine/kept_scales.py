"""Keeps the values that `plywise.engine.backward_scale` measures in ``optimizer.state[weight]``.

Beside the optimizer's own keys, the state of a weight has

- ``"plywise.backward_scale.0"``, ``".1"`` and so on: the values of its calls, in the order of backward; -1 in
  a template. If parts of a weight are used apart, each has its own: ``"plywise.backward_scale[0:8].0"``;
- ``"plywise.backward_scale.count"``: how many values there are;
- ``"plywise.backward_scale.step"``, ``"plywise.backward_scale.missing"``: the steps that have been taken, and
  whether the next pass must measure, because a value is missing;
- ``"plywise.backward_scale.name"``: a number made from the parameter's name.

All are plain numbers: torch's flattened state dicts take no lists, and would cast tensors. Savers that load
in place bring only what they find, so templates say what there will be, and the count shows what is lost.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise.engine.capture.table import ParameterTable
from plywise.engine.sites import ParameterEntry, Site, format_use
from plywise.engine.statistics.saved_keys import SCALES
from plywise.engine.statistics.saved_names import (
    add_names,
    check_name_numbers,
    check_names,
    check_number,
    find_indices,
    make_number,
)
from plywise.engine.statistics.state_dicts import complete_stateless, note_detached, warn_if_lost
from plywise.errors import StateError

CLOCK, MISSING, COUNT, NAME = (f"{SCALES}.{name}" for name in ("step", "missing", "count", "name"))
UNKNOWN = -1.0

Values = dict[Site, list[float]]
State = dict[Any, Any]


class KeptScales:
    """Reads and writes the values of one attachment.

    Args:
        table: the parameters of the model.
        optimizer: the optimizer; without it, nothing is kept.
        loaded: called after a state dict has been loaded.

    Attributes:
        step: steps that have been taken.
        is_missing: whether the next pass must measure, because a value is missing.

    Raises:
        StateError: the optimizer's state holds only some of the values that were saved.
    """

    def __init__(
        self, table: ParameterTable, optimizer: Optimizer | None, loaded: Callable[[], None]
    ) -> None:
        self._table = table
        self._optimizer_ref = None if optimizer is None else weakref.ref(optimizer)
        self._loaded = loaded
        self._local: Values = {}
        self._uses: dict[Site, str] = {}
        self._handles = []
        self.step = 0
        self.is_missing = False
        if optimizer is not None:
            check_name_numbers(optimizer.state, self._list_own_parameters(), NAME)
            for entry, own in self._list_states(optimizer):
                _check(entry, own)
            warn_if_lost(optimizer, "values measured by back-matching", lambda key: key == COUNT)
            self._handles = [
                optimizer.register_state_dict_post_hook(self._add_to_saved),
                optimizer.register_load_state_dict_pre_hook(self._take_from_loaded),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
            self._after_load(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, while it lives."""
        return None if self._optimizer_ref is None else self._optimizer_ref()

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the values out of its state."""
        for handle in self._handles:
            handle.remove()
        self.reset()
        optimizer = self.optimizer
        if optimizer is not None:
            note_detached(optimizer)

    def reset(self) -> None:
        """Forget all values."""
        self.step, self.is_missing = 0, False
        self._local.clear()
        optimizer = self.optimizer
        for parameter, own in [] if optimizer is None else list(optimizer.state.items()):
            if isinstance(own, dict) and COUNT in own:
                for key in list(filter(_is_ours, own)):
                    del own[key]
                if not own:
                    del optimizer.state[parameter]  # type: ignore[union-attr]

    def read(self, site: Site) -> list[float]:
        """Return the values of a site's calls; an empty list if there are none."""
        optimizer, parameter = self.optimizer, site.entry.parameter()
        own = None if optimizer is None or parameter is None else optimizer.state.get(parameter)
        values = _read_values(own, self._name(site)) if own else []
        return values or self._local.get(site, [])

    def write(self, found: Values, local: Values) -> None:
        """Put values beside the optimizer's own state, and templates for savers that ask what there is.

        Only where the optimizer has stepped: many begin a parameter's state when there is none.

        Args:
            found: the values, of parameters that the optimizer steps.
            local: the values that are kept for frozen parameters, too, which have no state.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        stepped = {id(p) for p in list_parameters(optimizer) if p.grad is not None}
        for parameter, entry in self._list_own_parameters():
            if id(parameter) not in stepped:
                continue
            own = optimizer.state[parameter]
            for site in entry.sites.values():
                if site in found:
                    _write_values(own, self._name(site), found[site])
            self._complete(entry, own)
        self._local.update(local)

    def _name(self, site: Site) -> str:
        """Return what a site's keys have in front of the number of the call."""
        if site not in self._uses:
            names: set[str] = set()
            for other in site.entry.sites.values():
                name = format_use(other)
                while name in names:  # the same use, in another order of memory
                    name += "'"
                names.add(name)
                self._uses[other] = name
        return self._uses[site]

    def _complete(self, entry: ParameterEntry, own: State) -> None:
        """Bring the counters of a parameter up to date, and add templates for calls without a value."""
        values = _find_values(own)
        for key in [key for key, value in values.items() if value == UNKNOWN]:
            del own[key]
        own[CLOCK], own[MISSING], own[NAME] = self.step, int(self.is_missing), make_number(entry.name)
        own[COUNT] = sum(value != UNKNOWN for value in values.values())
        uses = [self._name(site) for site in entry.sites.values()]
        if not uses and entry.expected and not own[COUNT]:
            uses = [""]
        for use in uses:
            own.setdefault(_make_key(use, 0), UNKNOWN)

    def _list_own_parameters(self) -> Iterator[tuple[Tensor, ParameterEntry]]:
        """List the weights that the rule may take, whether or not a call of theirs has been seen."""
        for entry in self._table.entries:
            parameter = entry.parameter()
            if parameter is not None and not entry.why_left and (entry.sites or entry.is_weight):
                yield parameter, entry

    def _list_states(self, optimizer: Optimizer) -> Iterator[tuple[ParameterEntry, State]]:
        for parameter, entry in self._list_own_parameters():
            own = optimizer.state.get(parameter)
            if own and isinstance(own, dict):
                yield entry, own

    # ---- in state dicts ------------------------------------------------------------------------------

    def _add_to_saved(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        states = {index: dict(own) if isinstance(own, dict) else own for index, own in state["state"].items()}
        indices = find_indices(optimizer, state)
        add_names(state, indices, self._table.entries)
        if not any(states.values()):
            return
        for parameter, entry in self._list_own_parameters():
            own = states.get(indices.get(parameter))
            if own and not nn.parameter.is_lazy(parameter):
                self._complete(entry, own)
        complete_stateless(states, indices)
        state["state"] = states

    def _take_from_loaded(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Check the values to load, and take out what stands for missing ones in torch's flattened form."""
        indices, states = find_indices(optimizer, state), dict(state["state"])
        check_names(state, indices, self._table.entries)
        if any(states.values()) and not any(COUNT in own for own in states.values() if own):
            raise StateError(
                "The optimizer state to load holds no values measured by back-matching: it was saved without "
                "the rule. To measure them again, load it before attach().",
                see="state-memory",
            )
        for parameter, entry in self._list_own_parameters():
            index = indices.get(parameter)
            own = states.get(index)
            if own:
                _check(entry, own)
                is_saved = isinstance(own.get(COUNT), int)
                states[index] = {
                    key: value
                    for key, value in own.items()
                    if not _is_ours(key) or (is_saved and not isinstance(value, dict))
                }
        return {**state, "state": states}

    def _after_load(self, optimizer: Optimizer) -> None:
        self._local.clear()
        states = [own for own in optimizer.state.values() if isinstance(own, dict)]
        self.is_missing = any(own.get(MISSING, 0) for own in states)
        self.step = max((own.get(CLOCK, 0) for own in states), default=0)
        for entry, own in self._list_states(optimizer):
            self._complete(entry, own)  # where a later load in place may have something to put
        self._loaded()


def _check(entry: ParameterEntry, own: Mapping[Any, Any]) -> None:
    """Raise StateError unless all values of a parameter are there that were saved."""
    for key in (CLOCK, MISSING, COUNT):
        if not isinstance(
            own.get(key, {}), dict
        ):  # torch's flattened form has empty dicts for missing values
            check_number(entry.name, key, own[key])
    values = [value for value in _find_values(own).values() if isinstance(value, float)]
    saved = own.get(COUNT)
    if isinstance(saved, int) and saved != sum(value != UNKNOWN for value in values):
        raise StateError(
            f"The values that back-matching has measured at {entry.name!r} were saved, but not all have "
            "arrived: torch's flattened and distributed checkpoints load only what they find in the "
            "optimizer, and the calls of that weight have not been seen yet. Take one training step "
            "(forward, backward, optimizer.step()) after attach() and before get_state_dict or "
            "set_state_dict.",
            see="state-memory",
        )


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith((f"{SCALES}.", f"{SCALES}["))


def _find_values(own: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values in a parameter's state, and what stands for missing ones."""
    return {key: value for key, value in own.items() if _is_ours(key) and key.rpartition(".")[2].isdigit()}


def _make_key(use: str, call: int) -> str:
    return f"{SCALES}{use}.{call}"


def _read_values(own: Mapping[Any, Any], use: str) -> list[float]:
    values: Iterator[float] = (own.get(_make_key(use, call), UNKNOWN) for call in count())
    return list(takewhile(lambda value: value != UNKNOWN, values))


def _write_values(own: State, use: str, values: list[float]) -> None:
    for call in count():
        key = _make_key(use, call)
        if call < len(values):
            own[key] = values[call]
        elif own.pop(key, None) is None:
            break
