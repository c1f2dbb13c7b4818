"""Parameters of a model, and the calls that use them.

A `ParameterEntry` is one parameter with everything the engine knows of it before any call; a `Site` is one
way in which calls use it: a layer's call of a linear map. Most parameters have one site. A weight whose
parts are used apart (attention's stacked projections) has one site for each part.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer, Parameter, UninitializedParameter

from plywise.engine.call import LinearCall, Update
from plywise.engine.explain import Size
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.layouts import Layout
from plywise.engine.passes import RecentPasses, find_pass
from plywise.engine.sharding import Sharding

PLAIN_TYPES = {Tensor, Parameter, Buffer, UninitializedParameter}
"""Tensors without a ``__torch_function__`` or a ``__torch_dispatch__`` of their own."""

TRACERS = {"FakeTensor", "FunctionalTensor"}
"""Types of tensors without numbers: torch.export runs a model with them, and estimates of memory do."""

TRANSFORM = "a torch.func transform"
"""In the list of functions that use a parameter: all calls that are left to autograd."""

Part = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A view of a parameter: offset, shape and strides."""


class Owner(NamedTuple):
    """A module that owns a parameter: its path, a weak reference to it, and the parameter's name there."""

    path: str
    module: weakref.ref[nn.Module]
    key: str

    def find(self) -> Tensor | None:
        """Return what the module has under that name now."""
        module = self.module()
        return None if module is None else module._parameters.get(self.key)


@dataclass(eq=False)
class ParameterEntry:
    """One parameter of the model.

    Attributes:
        name: its key in ``state_dict()``, without wrappers' prefixes.
        layer: path of the module that owns it (the first one, if it is tied).
        attribute: its name in that module.
        parameter: weak reference to it.
        owners: every module that owns it.
        excluded: why the rule must not take it, or "".
        expected: the kind of map that its module is known to call, or "".
        may_scale: whether the rule takes it as the elementwise weight of a norm, should calls use it so.
        left: why it is left to the optimizer, if captured calls have shown that, or "".
        leave_next: why it will be left to the optimizer from the next forward on, or "".
        used_by: functions that were seen to use it outside of captured calls.
        computed_into: the parameter that stands for the weight which is computed from this one and others.
        sites: the ways in which calls use it.
        is_new: whether it was found after the rule was attached.
        rests: whether its calls are left to autograd for now, since the step makes the update.
        arrived: whether a gradient has arrived, while it rests, since the last step.
        sharding: how fully_shard spreads it over processes, or None.
        compares: whether the next gradient that arrives is compared with the answers.
        incomparable: whether answers are not all that calls send to it, so that nothing can be compared.
        answer: the last backward pass in which calls of it were answered, and the sum of the answers.
    """

    name: str
    layer: str
    attribute: str
    parameter: weakref.ref[Tensor]
    owners: list[Owner]
    excluded: str = ""
    expected: str = ""
    may_scale: bool = False
    left: str = ""
    leave_next: str = ""
    used_by: dict[str, None] = field(default_factory=dict)
    computed_into: "ParameterEntry | None" = None
    sites: dict[Any, "Site"] = field(default_factory=dict)
    is_new: bool = False
    rests: bool = False
    arrived: bool = False
    sharding: Sharding | None = None
    last: "tuple[LinearMap, Layout, int, Site] | None" = None
    compares: bool = False
    incomparable: bool = False
    answer: tuple[int, Tensor] | None = None

    def add_answer(self, answer: Tensor, weight: Tensor) -> None:
        """Remember what the running backward pass sends to the parameter, if ``weight`` is all of it."""
        if weight is not self.parameter() or answer.shape != weight.shape:
            self.stop_comparing()
            return
        task = find_pass()
        if self.answer is not None and self.answer[0] == task:
            answer = self.answer[1] + answer
        self.answer = task, answer

    def stop_comparing(self) -> None:
        """Compare no gradient with the answers any more."""
        self.incomparable, self.compares, self.answer = True, False, None

    def name_in(self, layer: str) -> str:
        """Return what it is called as the weight of a layer: by the layer's own name, if it is ``weight``."""
        attribute = "" if self.attribute == "weight" else self.attribute
        return ".".join(filter(None, (layer, attribute)))

    @property
    def weight_name(self) -> str:
        """What `Site.name` is if the whole parameter is used in one way."""
        return self.name_in(self.layer)

    @property
    def key(self) -> str:
        """Its name in the module that has it: not `attribute` where a parametrization has renamed it."""
        return self.name.rpartition(".")[2]

    @property
    def is_original(self) -> bool:
        """Whether a weight is known to be computed from it (by a parametrization, or a hook of torch)."""
        return self.key != self.attribute

    def find_owner(self, module: nn.Module | None) -> tuple[str, nn.Module | None]:
        """Return path and module of the owner that ``module`` is; if it is none, those of the first owner."""
        for owner in self.owners:
            if module is not None and owner.module() is module:
                return owner.path, module
        return self.layer, self.owners[0].module()

    def follow_owners(self, now: "ParameterEntry") -> None:
        """Take over the owners that the parameter has now: modules may have been tied, or untied, since."""
        modules = {id(owner.module()) for owner in now.owners}
        before = {id(owner.module()) for owner in self.owners}
        if modules != before and modules & before:  # else a parametrization has moved it
            self.name, self.layer, self.attribute = now.name, now.layer, now.attribute
            self.owners, self.last = now.owners, None
            kept = {key: site for key, site in self.sites.items() if id(site.module) in modules}
            if len(modules) == 1:  # then keys name no owner
                kept = {(*key[:2], None, *key[3:]): site for key, site in kept.items()}
            self.sites = kept

    @property
    def dimensions(self) -> int:
        """Number of the parameter's dimensions; 0 if it is gone or not made yet."""
        parameter = self.parameter()
        return 0 if parameter is None or nn.parameter.is_lazy(parameter) else parameter.dim()

    @property
    def is_weight(self) -> bool:
        """Whether calls may use it as a weight; before the first call: whether it is more than a bias."""
        is_scale = self.dimensions == 1 and self.may_scale and not self.attribute.endswith("bias")
        return bool(self.expected) or self.dimensions > 1 or is_scale

    @property
    def may_hold_weights(self) -> bool:
        """Whether calls may use it, or parts of a vector of all weights, as a weight."""
        return self.is_weight or (self.dimensions == 1 and not self.attribute.endswith("bias"))

    @property
    def is_candidate(self) -> bool:
        """Whether calls may use it in a way that the rule takes; one that is not made yet may show any."""
        return not self.why_left and (self.is_weight or not self.dimensions)

    @property
    def is_vector_of_weights(self) -> bool:
        """Whether only its calls can show that it holds weights, because it is a vector."""
        return not self.why_left and not self.is_weight and self.may_hold_weights

    @property
    def trains(self) -> bool:
        """Whether the parameter is there and not frozen."""
        parameter = self.parameter()
        return parameter is not None and parameter.requires_grad

    @property
    def is_unknown(self) -> bool:
        """Whether it may be a weight, and no function has been seen to use it so far.

        A function that computes a weight from it does not count.
        """
        if self.sites or self.computed_into is not None or not self.is_candidate:
            return False
        return self.dimensions > 1 and (self.is_original or not self.used_by)

    @property
    def why_left(self) -> str:
        """Why it is left to the optimizer, or "" if the rule may take it."""
        return self.excluded or self.left


class Responder(Protocol):
    """Answers for a captured call in backward."""

    def respond(
        self, ctx: Any, a: Tensor, weight: Tensor, delta: Tensor, wants_update: bool, wants_below: bool
    ) -> tuple[Update, Tensor | None]:
        """Return the layer's update, and the gradient at the input of the call's map.

        The gradient is None if it is not wanted, and if a `RearrangedCall` has to make the plain one.
        """


class Site:
    """One way in which calls use a parameter.

    Attributes:
        name: name of the layer, as rules and users see it.
        entry: the parameter.
        map: how the calls read as linear maps.
        layout: how the weight becomes canonical.
        part: the view of the parameter that is the weight; None for the whole parameter.
        computed: the shape of a weight that is computed from the parameter (a parametrization), else None.
        responder: answers in backward.
        bias: weak reference to the bias parameter that the calls add, or None.
        adds: weak reference to the parameter that the added bias is, or is a view of, or None.
        bias_entry: what is known of that parameter, or None.
        has_whole_bias: whether the bias has a number for each output.
        bias_shape: its shape where it is not (outputs,), else None.
        size: sizes of the last call seen in backward.
        rows: shape of its output.
        dtype: dtype of its output.
        kept: how many rows of the last call counted, and of how many, if a mask left some out; else None.
        passes: backward passes in which the rule has answered.
        answered: the latest of those passes whose gradient has not arrived yet.
        tested: whether the self-test has been made.
    """

    def __init__(
        self,
        name: str,
        entry: ParameterEntry,
        map_: LinearMap,
        layout: Layout,
        responder: Responder,
        module: nn.Module | None,
    ) -> None:
        self.name = name
        self.entry = entry
        self.map = map_
        self.layout = layout
        self.responder = responder
        self.part: Part | None = None
        self.computed: torch.Size | None = None
        self.bias: weakref.ref[Tensor] | None = None
        self.adds: weakref.ref[Tensor] | None = None
        self.bias_entry: ParameterEntry | None = None
        self.has_whole_bias = True
        self.bias_shape: torch.Size | None = None
        self.size: Size | None = None
        self.rows: torch.Size | None = None
        self.dtype: torch.dtype | None = None
        self.kept: tuple[int, int] | None = None
        self.passes = 0
        self.answered = RecentPasses[None]()
        self.tested = False
        self._module = None if module is None else weakref.ref(module)

    def note_call(self, call: LinearCall, kept: tuple[int, int] | None) -> None:
        """Remember the sizes of a call seen in backward, and how many rows of it a mask has kept."""
        self.kept, self.dtype = kept, call.delta.dtype
        if self.size is None or (self.rows, self.size.is_topmost) != (call.delta.shape, call.is_topmost):
            self.rows = call.delta.shape
            self.size = Size(call.row_count, call.columns, call.outputs, call.groups, call.is_topmost)

    def is_like(self, other: "Site") -> bool:
        """Return whether another use of the parameter can share a running state: only strides may differ."""
        mine, its = (
            (site.part, site.layout, site.map.groups, site.computed, site.module) for site in (self, other)
        )
        return mine == its

    @property
    def takes_bias(self) -> bool:
        """Whether the rule takes the bias that calls add; one that is left to the optimizer is a constant."""
        return self.has_whole_bias and (self.bias_entry is None or not self.bias_entry.excluded)

    @property
    def module(self) -> nn.Module | None:
        """The module that owns the weight, while it lives."""
        return None if self._module is None else self._module()

    def answer_pass(self) -> None:
        """Remember that the rule has answered in the running backward pass."""
        self.passes += find_pass() not in self.answered
        self.answered[find_pass()] = None

    @property
    def weight(self) -> Tensor | None:
        """The parameter, while it lives."""
        return self.entry.parameter()

    def view_part(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor like the parameter that is this site's weight."""
        if self.part is None:
            return tensor
        offset, shape, strides = self.part
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def find_part(tensor: Tensor, base: Tensor) -> Part | None:
    """Return which part of ``base`` a view of it is; None for the whole in its own layout."""
    if tensor.shape == base.shape and tensor.stride() == base.stride():
        return None
    offset = int(tensor.storage_offset() - base.storage_offset())
    return offset, tuple(tensor.shape), tensor.stride()


def format_part(part: Part, whole: Tensor) -> str:
    """Return a part of a weight as text: ``"[0:8]"`` for rows 0 to 7."""
    offset, shape, strides = part
    row = whole.stride(0) if whole.dim() else 0
    if strides == whole.stride() and shape[1:] == whole.shape[1:] and row and offset % row == 0:
        return f"[{offset // row}:{offset // row + shape[0]}]"
    sizes, steps = ("x".join(map(str, numbers)) for numbers in (shape, strides))
    return f"[{offset}+{sizes}/{steps}]"


def format_use(site: Site) -> str:
    """Return what stands for a use of a parameter in keys: "" for the whole weight of its layer."""
    weight = site.weight
    if site.part is not None and weight is not None:
        return format_part(site.part, weight)
    return "" if site.name == site.entry.weight_name else f"[{site.name.replace('.', '/')}]"


def is_tracer(tensor: Tensor) -> bool:
    """Return whether a tensor only traces a model's calls: they say nothing about training."""
    return type(tensor).__name__ in TRACERS
