"""A layer with a running state: its sizes, and its parameters, which are looked up in each step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from plywise.engine.call import Update
from plywise.engine.contract import LayerShape
from plywise.engine.maps.layouts import ELEMENTWISE, PLAIN, TRANSPOSED, Layout, make_transposed_layout
from plywise.engine.passes import find_pass
from plywise.engine.processes.followed_parameters import explain_replaced
from plywise.engine.selection import is_in_out
from plywise.engine.sharding import mark_gradient
from plywise.engine.sites import ParameterEntry, Site
from plywise.errors import AttachError

COMING = -1
"""Stands for a gradient that is not in its place yet."""


class LayerHandle:
    """A layer with a running state.

    Args:
        name: its name.
        entry: the parameter that is its weight.
        site: the calls that use it; None before the first of them.
        own_bias: what is known of the bias of its module, until a call shows which one is added; or None.

    Attributes:
        stand_ins: tensors that take the place of ``.grad`` for a while, by the parameter's id: the whole
            gradients of sharded parameters, the optimizer's steps.
        expects_bias: whether the first call is expected to add the module's bias, if it has one.
        acts_alone: whether backward makes all its updates: the weight is computed or used in several ways, so
            that the step has no gradient of this use alone.
        counts_bias: whether the bias belongs to the layer; None if it does while it trains.
        shares_bias: whether layers with other weights add the same bias, so that it belongs to none of them.
    """

    def __init__(
        self, name: str, entry: ParameterEntry, site: Site | None, own_bias: ParameterEntry | None = None
    ) -> None:
        self.name = name
        self.entry = entry
        self.site = site
        self._own_bias = own_bias
        self.stand_ins: dict[int, Tensor] = {}
        self.expects_bias = True
        self.acts_alone = False
        self.counts_bias: bool | None = None
        self.shares_bias = False
        module = None if site is None else site.module
        own = (owner for owner in entry.owners if module is not None and owner.module() is module)
        self._owner = next(own, entry.owners[0])
        self._module = self._owner.module

    @property
    def gone(self) -> bool:
        """Whether the model is gone, while its optimizer lives on."""
        return self._module() is None

    @property
    def is_in_place(self) -> bool:
        """Whether the model is there, and has the parameter that the rule was attached to."""
        try:
            return not self.gone and self.weight is not None
        except AttachError:
            return False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the rule was attached to."""
        weight, current = self.entry.parameter(), self._owner.find()
        sharding = self.entry.sharding
        stands_in = sharding is not None and current is sharding.whole
        if weight is None or current is None or not (current is weight or stands_in):
            raise AttachError(explain_replaced(self._owner.path), see="attach-optimizer")
        return cast(nn.Parameter, weight)

    @property
    def statistic_like(self) -> Tensor:
        """An empty tensor with the dtype and on the device of the layer's statistics."""
        weight = self.weight
        return torch.empty(0, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)

    @property
    def trained(self) -> list[Tensor]:
        """The weight, and the bias if it trains."""
        bias = self.bias
        return [self.weight] if bias is None else [self.weight, bias]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one, it trains, and it belongs to this layer.

        One that is computed (a parametrization), shared, or left to the optimizer, is a constant.
        """
        bias, is_taken = None, self._own_bias is None or not self._own_bias.excluded
        if self.site is not None:
            bias, is_taken = None if self.site.bias is None else self.site.bias(), self.site.takes_bias
        elif self.expects_bias:
            module = self._module()
            bias = None if module is None else module._parameters.get(find_bias_name(self.entry))
        counts = self.counts_bias is None or self.counts_bias
        trains = bias is not None and bias.requires_grad and is_taken and not self.shares_bias
        return bias if counts and (self.counts_bias or trains) else None

    @contextmanager
    def with_bias(self, counts: bool) -> Iterator[None]:
        """Count the bias, or do not, whether or not it trains now: as the layer's statistics do."""
        self.counts_bias = counts
        try:
            yield
        finally:
            self.counts_bias = None

    @property
    def groups(self) -> int:
        """Groups of the layer."""
        return self.site.map.groups if self.site is not None else predict_groups(self._module())

    @property
    def layout(self) -> Layout:
        """How the weight becomes canonical."""
        return self.site.layout if self.site is not None else predict_layout(self._module(), self.weight)

    def _view_part(self, tensor: Tensor) -> Tensor:
        return tensor if self.site is None else self.site.view_part(tensor)

    @property
    def shape(self) -> LayerShape:
        """Sizes of the layer."""
        weight: Tensor = self.weight
        groups, device = self.groups, weight.device
        if self.site is not None and self.site.computed is not None:
            weight = torch.empty(self.site.computed, dtype=weight.dtype, device="meta")
        elif self.entry.sharding is not None:  # reshaping shards would move data
            weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        with torch.no_grad():
            canonical = self.layout.to_canonical(self._view_part(weight)).shape
        columns = canonical[1:].numel() + (self.bias is not None)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LayerShape(groups, canonical[0] // groups, columns, dtype, device)

    # ---- the gradient ----------------------------------------------------------------------------

    @property
    def gradient_dtype(self) -> torch.dtype | None:
        """The dtype in which the last captured call made the gradient; under autocast not the weight's."""
        return None if self.site is None else self.site.dtype

    @property
    def has_sharded_gradient(self) -> bool:
        """Whether there is a gradient of which this process has a shard."""
        return self.entry.sharding is not None and self.weight.grad is not None

    @property
    def has_gradient(self) -> bool:
        """Whether there is a gradient to make an update from."""
        weight = self.weight
        return weight.grad is not None or id(weight) in self.stand_ins

    def mark_gradient(self) -> tuple[int, int]:
        """Return which tensor ``.grad`` is now, and how often it has been written to."""
        gradient = self.weight.grad
        if gradient is None or self.entry.sharding is not None:  # it comes once this backward pass is over
            return COMING, find_pass()
        return mark_gradient(gradient)

    def holds_gradient(self, mark: tuple[int, int]) -> bool:
        """Return whether ``.grad`` still holds what was accumulated (it may be scaled or averaged since)."""
        weight = self.weight
        if mark == (COMING, find_pass()):
            return True
        if self.entry.sharding is not None:
            return self.entry.sharding.holds_gradient(weight)
        return weight.grad is not None and (mark_gradient(weight.grad) == mark or bool(weight.grad.any()))

    def read_gradient(self) -> Update:
        """Return the gradient as an update of the canonical weight; a missing bias gradient is zero."""
        weight, bias = self.weight, self.bias
        grad = self._get_gradient(weight)
        if self.site is not None and self.site.part is not None and grad.stride() != weight.stride():
            weight.grad = grad = torch.empty_like(weight).copy_(grad)
        if bias is not None and bias.grad is None and id(bias) not in self.stand_ins:
            bias.grad = torch.zeros_like(bias)
        canonical = self.make_canonical(grad)
        return Update(canonical, None if bias is None else self._get_gradient(bias).reshape(-1))

    @property
    def gradient_is_plain(self) -> bool:
        """Whether what `read_gradient` gives is the gradient itself, so that it can be written to."""
        bias = self.bias
        return self.layout is PLAIN and (bias is None or bias.dim() == 1)

    @property
    def is_plain(self) -> bool:
        """Whether weight and bias are stored whole and in their canonical shapes."""
        return self.gradient_is_plain and (self.site is None or self.site.part is None)

    def make_canonical(self, tensor: Tensor) -> Tensor:
        """Return the canonical form of a tensor that is stored like the weight; a view of it, or a copy."""
        return self.layout.to_canonical(self._view_part(tensor))

    def write_canonical(self, tensor: Tensor, canonical: Tensor) -> None:
        """Put a canonical weight into a tensor that is stored as the weight is."""
        target = self._view_part(tensor)
        target.copy_(self.layout.from_canonical(canonical, target.shape))

    def write_gradient(self, update: Update) -> None:
        """Put an update of the canonical weight in the place of the gradient."""
        assert update.weight is not None
        self.write_canonical(self._get_gradient(self.weight), update.weight)
        bias = self.bias
        if bias is not None and update.bias is not None:
            target = self._get_gradient(bias)
            target.copy_(update.bias.reshape(target.shape))

    def find_gradient(self, parameter: Tensor) -> Tensor | None:
        """Return what stands for a parameter's gradient now."""
        return self.stand_ins.get(id(parameter), parameter.grad)

    def _get_gradient(self, parameter: Tensor) -> Tensor:
        """Return a parameter's gradient, whole."""
        gradient = self.find_gradient(parameter)
        assert gradient is not None
        return gradient


def find_trained(layers: Iterable[LayerHandle]) -> dict[int, Tensor]:
    """Return the parameters of layers that train, each once, by their ids."""
    return {id(parameter): parameter for layer in layers for parameter in layer.trained}


def find_bias_name(entry: ParameterEntry) -> str:
    """Return the name that the bias beside a weight has in a module of torch."""
    return "in_proj_bias" if entry.attribute == "in_proj_weight" else "bias"


def predict_groups(module: Any) -> int:
    """Groups of the map that a module of torch will call."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.weight.numel()
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.numel()  # batch, group and instance norm
    groups = getattr(module, "groups", 1)
    return groups if isinstance(groups, int) else 1


def predict_layout(module: Any, weight: Tensor) -> Layout:
    """Layout of the weight in the map that a module of torch will call."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return TRANSPOSED
    if is_in_out(type(module)):
        return TRANSPOSED
    if getattr(module, "transposed", False):
        return make_transposed_layout(predict_groups(module))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) or weight.dim() == 1:
        return ELEMENTWISE
    return PLAIN


def predict_canonical(module: Any, weight: Tensor) -> torch.Size:
    """Shape of the canonical weight of the map that a module of torch will call."""
    with torch.no_grad():
        return predict_layout(module, weight).to_canonical(weight).shape
