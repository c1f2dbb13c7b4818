"""Models whose forward calls a list of layers in a loop, such as transformers of Hugging Face and timm.

Such a model is cut between two of these layers, whatever else its forward does. A block runs the model's own
forward. The layers before the block return their input, the last of them the signal, and after the last layer
of the block the forward is left by an exception. So the model's own code makes masks, positions and caches,
from the model's inputs, which are carried along with the signal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.data.batches import TARGETS, Batch, clone_batch, count_samples, list_tensors
from plywise.data.models import call_model, find_scores
from plywise.errors import BlockError
from plywise.local.cutting.tracing import StaysWholeError


@dataclass(frozen=True)
class Spine:
    """A row of layers in a model.

    Attributes:
        path: the module that holds them.
        names: their names in it, in the order of their calls.
        before: parameters that are used before the first layer, by name.
        after: all others outside of the layers.
        widths: for each layer, how many values it returns; 0 for a tensor.
    """

    path: str
    names: tuple[str, ...]
    before: frozenset[str]
    after: frozenset[str]
    widths: tuple[int, ...]

    def name_parameters(self, model: nn.Module, unit: int) -> set[str]:
        """Return the parameters of a unit: what is before the layers, a layer, or what is after them."""
        if unit == 0:
            return set(self.before)
        if unit == len(self.names) + 1:
            return set(self.after)
        path = f"{self.path}.{self.names[unit - 1]}"
        return {f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()}


@dataclass(frozen=True)
class SpineUnit:
    """Some units of a spine in a row: unit 0 is before the layers, the last one after them."""

    spine: Spine
    start: int
    stop: int

    @property
    def label(self) -> str:
        """Its name in messages: the path of its first layer."""
        names = self.spine.names
        return repr(f"{self.spine.path}.{names[min(max(self.start - 1, 0), len(names) - 1)]}")

    def __add__(self, following: "SpineUnit") -> "SpineUnit":
        """Join it with the unit that follows."""
        return SpineUnit(self.spine, self.start, following.stop)

    def name_parameters(self, model: nn.Module) -> set[str]:
        """Return the parameters in it, by the names that they have in the model."""
        return set().union(*(self.spine.name_parameters(model, i) for i in range(self.start, self.stop)))

    def assemble(self, model: nn.Module) -> nn.Module:
        """Make a module that does what the unit does, on the model's own modules."""
        block = SpineBlock(model, self)
        block.training = model.training
        return block


class _LeftEarlyError(Exception):
    """The forward is left with this value."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _Stand(nn.Module):
    """Replaces a layer while a block runs; attributes are read from the layer itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class _Passing(_Stand):
    """Returns its input; the last one before a block returns the block's signal, where autograd begins."""

    def __init__(self, layer: nn.Module, width: int, signal: Tensor | None) -> None:
        super().__init__(layer)
        self.__dict__.update(_width=width, _signal=signal)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self._signal if self._signal is not None else find_input(args, kwargs)
        if self._signal is not None:
            torch.set_grad_enabled(self._grad)
        return (value, *[None] * (self._width - 1)) if self._width else value


class _Entering(_Stand):
    """The first layer of all, which gets the block's signal; autograd begins there."""

    def __init__(self, layer: nn.Module, signal: Tensor, grad: bool) -> None:
        super().__init__(layer)
        self.__dict__.update(_signal=signal, _grad=grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = find_input(args, kwargs)
        torch.set_grad_enabled(self._grad)
        args = tuple(self._signal if one is value else one for one in args)
        return self._layer(*args, **{k: self._signal if one is value else one for k, one in kwargs.items()})


class _Ending(_Stand):
    """Leaves the forward: before the layer, or after it has run."""

    def __init__(self, layer: nn.Module, runs: bool) -> None:
        super().__init__(layer)
        self.__dict__["_runs"] = runs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _LeftEarlyError(
            find_output(self._layer(*args, **kwargs)) if self._runs else find_input(args, kwargs)
        )


def find_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the activations among a layer's arguments: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def find_output(output: Any) -> Tensor:
    """Return the activations in what a layer returns: the tensor, or the first one of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class SpineBlock(nn.Module):
    """Some units of a model, on the model's own modules and parameters, under the names that they have there.

    Its forward takes the signal and the model's inputs, which are carried along.
    """

    carries = True

    def __init__(self, model: nn.Module, unit: SpineUnit) -> None:
        super().__init__()
        self.__dict__["_model"], self.__dict__["_unit"] = model, unit
        _register(self, model, unit.name_parameters(model))
        layers = model.get_submodule(unit.spine.path).children()
        known = {*self.modules(), *(module for layer in layers for module in layer.modules())}
        self.__dict__["_around"] = [module for module in model.modules() if module not in known]

    def forward(self, s: Tensor, carried: Batch = None) -> Tensor:
        """Return the activations after the last layer of the block, or the model's scores."""
        if carried is None:
            raise BlockError(
                "This block takes the model's inputs beside the signal, and this learner hands on one tensor "
                "only. Take LocalLoss, LocalNextToken or Interlocking."
            )
        model: nn.Module = self.__dict__["_model"]
        with self._standing(model, s), torch.set_grad_enabled(torch.is_grad_enabled()):
            if self.__dict__["_unit"].start > 0:
                torch.set_grad_enabled(False)  # up to the signal: what makes it is trained by others
            try:
                output: Tensor = find_scores(call_model(model, carried, TARGETS))
            except _LeftEarlyError as left:
                output = left.value
        return output

    @property
    def _first(self) -> int:
        """The first layer that runs."""
        unit: SpineUnit = self.__dict__["_unit"]
        return max(unit.start - 1, 0)

    @contextmanager
    def _standing(self, model: nn.Module, s: Tensor) -> Iterator[None]:
        """Replace the layers outside of the block, and put the modules around them into the block's mode."""
        unit: SpineUnit = self.__dict__["_unit"]
        spine, count = unit.spine, len(unit.spine.names)
        row = model.get_submodule(spine.path)
        kept = dict(row._modules)
        frames: list[nn.Module] = self.__dict__["_around"]
        modes = [frame.training for frame in frames]
        grad = torch.is_grad_enabled()
        try:
            for i in range(self._first):
                layer, is_last = _get(kept, spine.names[i]), i == self._first - 1
                row._modules[spine.names[i]] = stand = _Passing(
                    layer, spine.widths[i], s if is_last else None
                )
                stand.__dict__["_grad"] = grad
            if unit.start == 1:  # no layer before that could hand on the signal
                row._modules[spine.names[0]] = _Entering(_get(kept, spine.names[0]), s, grad)
            if unit.stop <= count + 1:
                end = max(unit.stop - 2, 0)  # the last layer that runs, or the first one where none does
                row._modules[spine.names[end]] = _Ending(_get(row._modules, spine.names[end]), unit.stop > 1)
            for frame in frames:
                frame.training = self.training
            yield
        finally:
            row._modules.clear()
            row._modules.update(kept)
            for frame, mode in zip(frames, modes, strict=True):
                frame.training = mode


def _get(modules: dict[str, nn.Module | None], name: str) -> nn.Module:
    module = modules[name]
    assert module is not None
    return module


def _register(holder: nn.Module, module: nn.Module, names: set[str], path: str = "") -> None:
    """Put modules of the model into a block, or alone those of their parameters that are in it."""
    for name, parameter in module._parameters.items():
        if f"{path}{name}" in names:
            holder.register_parameter(name, parameter)
    for name, child in module.named_children():
        inside = [f"{path}{name}.{own}" for own, _ in child.named_parameters()]
        if inside and names.issuperset(inside):
            holder.add_module(name, child)
        elif names.intersection(inside):
            holder.add_module(name, part := nn.Module())
            _register(part, child, names, f"{path}{name}.")


# ---- finding ---------------------------------------------------------------------------------------


def find_spine(model: nn.Module, example: Batch) -> Spine:
    """The longest row of layers that a model's forward calls one after another. The model stays as it is.

    Args:
        model: the model.
        example: a batch of inputs.

    Raises:
        StaysWholeError: there is none; says why.
    """
    rows = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    if not rows:
        raise StaysWholeError("it has no row of layers (an nn.ModuleList or nn.Sequential) to be cut at")
    calls = {path: _Calls(row) for path, row in rows.items()}
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
            call_model(model, clone_batch(example), TARGETS)
    finally:
        for one in calls.values():
            one.close()
    reasons = {path: one.why_not(count_samples(example)) for path, one in calls.items()}
    fitting = [path for path, reason in reasons.items() if not reason]
    if not fitting:
        raise StaysWholeError("; ".join(f"{path!r}: {reason}" for path, reason in list(reasons.items())[:3]))
    path = max(fitting, key=lambda one: len(rows[one]))
    widths = tuple(calls[path].widths)
    names = tuple(name for name, _ in rows[path].named_children())
    inside = {id(p) for p in rows[path].parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    whole = Spine(path, names, frozenset(outside), frozenset(outside), widths)
    before = _find_used(model, whole, 0, 1, outside, example)
    after = _find_used(model, whole, len(names) + 1, len(names) + 2, outside, example)
    if both := before & after:
        raise StaysWholeError(
            f"its parameter {min(both)!r} is used before and after {path!r}: two blocks would train it "
            "(where weights are tied, make the model untied, as by config.tie_word_embeddings = False)"
        )
    return Spine(path, names, frozenset(before), frozenset(outside.keys() - before), widths)


class _Calls:
    """What the layers of a row were called with, and what they returned."""

    def __init__(self, row: nn.Module) -> None:
        self._count = 0
        self._called: list[int] = []
        self._last: Tensor | None = None
        self._fault = ""
        self.widths: list[int] = []
        self._handles = []
        for number, layer in enumerate(row.children()):
            self._count += 1
            self._handles.append(layer.register_forward_hook(self._make_hook(number), with_kwargs=True))

    def _make_hook(self, number: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._called.append(number)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not tensors or not isinstance(find_first(output), Tensor):
                self._fault = self._fault or f"layer {number} takes or returns no tensor"
                return
            if self._last is not None and tensors[0] is not self._last:
                self._fault = self._fault or f"layer {number} does not get what layer {number - 1} returned"
            self._last = find_output(output)
            self.widths.append(0 if isinstance(output, Tensor) else len(output))

        return record

    def why_not(self, samples: int) -> str:
        """Return why the row is not one of layers on top of each other; "" if it is."""
        if self._called != list(range(self._count)):
            return f"its {self._count} layers are called in the order {self._called[:6] or 'of none'}"
        if not self._fault and self._last is not None and len(self._last) != samples:
            return f"it hands on {tuple(self._last.shape)} for {samples} samples"
        return self._fault

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def find_first(output: Any) -> Any:
    """Return a value, or the first one of a tuple."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _find_used(
    model: nn.Module, spine: Spine, start: int, stop: int, outside: dict[str, nn.Parameter], example: Batch
) -> set[str]:
    """Return the parameters outside of the layers that a unit's output depends on."""
    frozen = [p for p in outside.values() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), evaluating(model):
            signal = _find_signal(model, spine, example)
            output = SpineBlock(model, SpineUnit(spine, start, stop)).eval()(signal, clone_batch(example))
            kept = {name: p for name, p in outside.items() if p.requires_grad}
            if not output.requires_grad or not kept:
                return set()
            found = torch.autograd.grad(output.sum(), list(kept.values()), allow_unused=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {name for name, gradient in zip(kept, found, strict=True) if gradient is not None}


def _find_signal(model: nn.Module, spine: Spine, example: Batch) -> Tensor:
    block = SpineBlock(model, SpineUnit(spine, 0, len(spine.names) + 1)).eval()
    with torch.no_grad():
        return block(list_tensors(example)[0], clone_batch(example)).detach()


def list_units(model: nn.Module, spine: Spine) -> list[SpineUnit]:
    """The units of a spine; what has no parameters belongs to what comes before, or else to what follows."""
    units: list[SpineUnit] = []
    start = 0
    for stop in range(1, len(spine.names) + 3):
        unit = SpineUnit(spine, start, stop)
        if not unit.name_parameters(model):
            if units:
                units[-1] += unit
                start = stop
            continue
        units.append(unit)
        start = stop
    return units
