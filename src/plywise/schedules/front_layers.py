"""Freezes the first layers of a model and thaws them again; a schedule decides how many."""

import math
import weakref
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise._util.optimizers import list_parameters
from plywise.engine.capture.capture import ModelHook
from plywise.engine.processes.replicas import find_running_wrapper
from plywise.engine.selection import strip_wrappers
from plywise.errors import AttachError

BLOCK = 2**20
"""The number of weights whose absolute values are held in memory at a time."""


class FrontLayers:
    """The layers of ``model`` that ``optimizer`` trains; the first ``count`` of them are frozen.

    A layer is a module with parameters of its own that require a gradient now. The reference to the model is
    weak.

    Attributes:
        parameters: the parameters of each layer by its name, in the order in which the model registers them.
        count: the number of frozen layers.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        stepped = set(map(id, list_parameters(optimizer)))
        # a module at two places is a layer at each of them, like a layer that shares its weight
        self.parameters: dict[str, list[nn.Parameter]] = {
            strip_wrappers(name): own
            for name, module in model.named_modules(remove_duplicate=False)
            if (own := [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) in stepped])
        }
        self.count = 0
        self._model = weakref.ref(model)
        self._thawed = False
        self._frozen: set[nn.Parameter] = set()  # frozen here: what the user froze is not touched
        self._held: dict[nn.Module, RemovableHandle] = {}
        self._handle = model.register_forward_pre_hook(_BeforeForward(self))

    @property
    def names(self) -> list[str]:
        """The names of all layers."""
        return list(self.parameters)

    def count_weights(self) -> dict[str, int]:
        """Count the weights of each layer."""
        return {
            name: sum(0 if nn.parameter.is_lazy(p) else p.numel() for p in parameters)
            for name, parameters in self.parameters.items()
        }

    def sum_gradients(self, optimizer: Optimizer) -> dict[str, float] | None:
        """Compute ``‖G‖₁`` of each layer, for a hook after the step; None if the step was not taken.

        It must run after the step: only then is it known whether a step was skipped, because the gradients of
        a skipped step are still hidden, or not finite.
        """
        stepped = [p for p in list_parameters(optimizer) if p.grad is not None]
        sums = dict(zip(stepped, _sum_absolute_values([p.grad for p in stepped]), strict=True))
        if not sums or not math.isfinite(sum(sums.values())):
            return None
        return {name: sum(sums.get(p, 0.0) for p in own) for name, own in self.parameters.items()}

    def count_closed(self, count: int) -> int:
        """Count the first layers, at most ``count``, that share no weight with a later layer."""
        layers = [{id(p) for p in parameters} for parameters in self.parameters.values()]
        while not set().union(*layers[:count]).isdisjoint(set().union(*layers[count:])):
            count -= 1
        return count

    def freeze(self, count: int) -> None:
        """Freeze the first ``count`` layers, at most all but one, and keep their batch norms in eval mode."""
        self.count, self._thawed = count, False
        for name in self.names[:count]:
            for p in self.parameters[name]:
                if p.requires_grad:
                    p.requires_grad_(False)
                    p.grad = None  # not zero: momentum and decay would still move the weights
                    self._frozen.add(p)
        model = self._model()
        if model is None or count == 0:
            return
        first = self.names[count]
        for _, norm in takewhile(lambda item: strip_wrappers(item[0]) != first, model.named_modules()):
            # the user put a batch norm in eval mode if its model is in training
            mine = isinstance(norm, _NormBase) and (norm.training or not model.training)
            if mine and norm not in self._held:
                norm.eval()
                self._held[norm] = norm.register_forward_pre_hook(_StayInEval())

    def thaw(self) -> None:
        """Undo what `freeze` did. If `freeze` does not follow, the next forward does it again."""
        self._thawed = True
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen.clear()
        model = self._model()
        for norm, handle in self._held.items():
            handle.remove()
            norm.train(model is not None and model.training)
        self._held.clear()

    def remove(self) -> None:
        """Thaw all layers and take the hooks off."""
        self._handle.remove()
        self.thaw()

    def check_before_forward(self) -> None:
        """Refuse unsuitable models; freeze layers again if `thaw` was called without `freeze`."""
        wrapper = find_running_wrapper()
        if wrapper is not None and (wrapper.static_graph or not wrapper.find_unused_parameters):
            raise AttachError(
                "DistributedDataParallel would wait for the gradients of frozen layers, which never come. "
                "Wrap the model by DistributedDataParallel(model, find_unused_parameters=True), without "
                "static_graph, or detach the schedule that freezes.",
                see="attach-freezing",
            )
        if self._thawed:
            self.freeze(self.count)
        for norm in self._held:  # torch.compile does not notice hooks that are added after its first call
            norm.eval()


class _BeforeForward(ModelHook):
    """Forward pre-hook of the model."""

    def __init__(self, layers: FrontLayers) -> None:
        self._look = torch.compiler.disable(layers.check_before_forward)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._look()


class _StayInEval(ModelHook):
    """Forward pre-hook of a frozen batch norm, which stays in eval mode also after ``model.train()``."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        module.eval()


def _sum_absolute_values(gradients: list[Tensor]) -> list[float]:
    """Compute ``‖·‖₁`` of each tensor, with a single wait for the device."""
    sums = []
    for gradient in gradients:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        dtype = torch.promote_types(values.real.dtype, torch.float32)
        # on a CPU, vector_norm sums sequentially: five times as slow, with an error of 1 % at 12 million
        # weights
        blocks = [block.abs().sum(dtype=dtype) for block in values.flatten().split(BLOCK)]
        sums.append(torch.stack(blocks).sum())
    return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []
