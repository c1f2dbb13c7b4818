"""A layer that a rule keeps a memory for: its parameters, found anew at each step, and its sizes."""

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from plywise.errors import AttachError
from plywise.layers import LayerType


@dataclass(frozen=True)
class LayerShape:
    """One layer's sizes, and where its statistics live.

    Attributes:
        groups: independent linear maps side by side, g.
        outputs: outputs of one group, m.
        columns: inputs of one group with the bias's column, k.
        dtype: dtype of statistics, float32 at least.
        device: the weight's device.
    """

    groups: int
    outputs: int
    columns: int
    dtype: torch.dtype
    device: torch.device


class KeptLayer:
    """A layer that a memory is kept for."""

    def __init__(self, name: str, kind: LayerType, module: nn.Module) -> None:
        self.name = name
        self.kind = kind
        self._module = weakref.ref(module)
        weight = self._parameter(kind.weight_name)
        assert weight is not None
        self._weight = weakref.ref(weight)

    def _parameter(self, name: str) -> nn.Parameter | None:
        module = self._module()
        return None if module is None else module._parameters.get(name)

    @property
    def gone(self) -> bool:
        """Whether the model is no more, while its optimizer lives on."""
        return self._module() is None

    @property
    def weight(self) -> nn.Parameter:
        """The weight that the rule was attached to."""
        weight = self._parameter(self.kind.weight_name)
        if weight is None or weight is not self._weight():
            raise AttachError(
                f"The weight of layer {self.name!r} is not the parameter that the rule was attached to "
                "(replaced by load_state_dict(assign=True) or a parametrization?). Attach the rule after "
                "such changes, with an optimizer made from the new parameters. After fully_shard no rule "
                "with memory can be attached: use DistributedDataParallel.",
                see="attach-optimizer",
            )
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if there is one and it trains; one that is computed (a parametrization) is a constant."""
        bias = self._parameter(self.kind.bias_name)
        return bias if bias is not None and bias.requires_grad else None

    @property
    def groups(self) -> int:
        """Groups of the layer."""
        module = self._module()
        assert module is not None
        return self.kind.groups(module)

    @property
    def shape(self) -> LayerShape:
        """Sizes of the layer."""
        module, weight, groups = self._module(), self.weight, self.groups
        assert module is not None
        columns = self.kind.width(module, weight) + (self.bias is not None)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LayerShape(groups, weight.shape[0] // groups, columns, dtype, weight.device)
