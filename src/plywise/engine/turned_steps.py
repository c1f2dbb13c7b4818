"""An optimizer at work in other coordinates: its step is taken from the weights and turned back.

The gradient that the optimizer sees is that of turned weights, the weights themselves are as they were. So
what it adds to them, beside a weight decay, is a step in the other coordinates.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine.contract import State, StatefulContract
from plywise.engine.health import Health
from plywise.engine.layer_handle import LayerHandle
from plywise.engine.optimizer_probe import OptimizerTraits, probe_optimizer
from plywise.engine.step_updates import StepsBack
from plywise.errors import PlywiseError


class TurnedSteps:
    """The steps of one optimizer in the coordinates of one rule.

    Args:
        rule: the rule.
        optimizer: the optimizer.
        health_: where steps that are not finite are counted.

    Raises:
        AttachError: the optimizer's steps cannot be turned.
    """

    def __init__(self, rule: StatefulContract, optimizer: Optimizer, health_: Health) -> None:
        self._rule = rule
        self._traits: OptimizerTraits = probe_optimizer(optimizer)
        self._back = StepsBack(rule, health_)
        self._layers: list[LayerHandle] = []
        self._memories: dict[str, State] = {}
        self._parameters: list[Tensor] = []
        self._bases: list[Tensor] = []

    # ---- weight decay ------------------------------------------------------------------------------

    def add_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer) -> None:
        """Add what a coupled weight decay adds, before gradients are turned: it belongs to the weights."""
        self._add_decay(layers, optimizer, 1.0)

    def take_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer) -> None:
        """Take from the turned gradients what the optimizer will add to them."""
        self._add_decay(layers, optimizer, -1.0)

    def _add_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer, sign: float) -> None:
        if self._traits.decay != "coupled":
            return
        scale = getattr(optimizer, "grad_scale", None)
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        for parameter in _list_parameters(layers):
            decay = decays.get(id(parameter), 0.0)
            if decay and parameter.grad is not None:
                added = parameter.detach() * (decay * sign)
                parameter.grad.add_(added if scale is None else added * scale)

    # ---- the step ------------------------------------------------------------------------------------

    def begin(self, layers: list[LayerHandle], memories: dict[str, State], optimizer: Optimizer) -> None:
        """The optimizer is about to step: keep what its weight decay alone would make of the weights."""
        for layer in layers:
            if layer.entry.sharding is not None:
                raise PlywiseError(
                    f"{type(self._rule).__name__} turns the steps of whole weights, and fully_shard has "
                    f"spread {layer.entry.name!r} over processes. Use DistributedDataParallel, or a rule "
                    "that turns none, such as Foof."
                )
        self._layers, self._memories = layers, memories
        self._parameters = _list_parameters(layers)
        factors = [1.0] * len(self._parameters)
        if self._traits.decay == "decoupled":
            decays = {
                id(p): 1 - float(g["lr"]) * g["weight_decay"]
                for g in optimizer.param_groups
                for p in g["params"]
            }
            factors = [decays.get(id(parameter), 1.0) for parameter in self._parameters]
        with torch.no_grad():
            self._bases = list(torch._foreach_mul(self._parameters, factors)) if layers else []

    def end(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped: turn its steps back."""
        layers, self._layers = self._layers, []
        parameters, self._parameters = self._parameters, []
        bases, self._bases = self._bases, []
        found_inf = getattr(optimizer, "found_inf", None)
        if not layers or (found_inf is not None and bool(found_inf)):  # a fused optimizer has not stepped
            return
        with torch.no_grad():
            steps = torch._foreach_sub(parameters, bases)
            stand_ins = {id(parameter): step for parameter, step in zip(parameters, steps, strict=True)}
            try:
                for layer in layers:
                    layer.stand_ins = stand_ins
                self._back.make(layers, self._memories)
            finally:
                for layer in layers:
                    layer.stand_ins = {}
            torch._foreach_add_(bases, steps)
            torch._foreach_copy_(parameters, bases)

    # ---- momenta ---------------------------------------------------------------------------------------

    def turn_momenta(
        self,
        layers: Sequence[LayerHandle],
        before: Mapping[str, State],
        after: Mapping[str, State],
        optimizer: Optimizer,
    ) -> None:
        """Bring momenta of these layers into new coordinates; without a state, the weights' own."""
        for layer in layers:
            old, new = before.get(layer.name, {}), after.get(layer.name, {})
            for name in self._traits.linear if old or new else ():
                momenta = {id(p): optimizer.state.get(p, {}).get(name) for p in layer.trained}
                if not all(isinstance(value, Tensor) for value in momenta.values()):
                    continue
                layer.stand_ins = momenta
                try:
                    update = layer.read_gradient()
                    matrix = update.matrix(layer.groups)
                    dtype = next(iter((new or old).values())).dtype
                    turned = self._rule.turn_momentum(old, new, matrix.to(dtype)).to(matrix.dtype)
                    if bool(torch.isfinite(turned.sum())):
                        assert update.weight is not None
                        layer.write_gradient(
                            type(update).of(turned, update.weight.shape, update.bias is not None)
                        )
                finally:
                    layer.stand_ins = {}


def _list_parameters(layers: Sequence[LayerHandle]) -> list[Tensor]:
    """The parameters of these layers, each once."""
    return list({id(p): p for layer in layers for p in layer.trained}.values())
