"""Captures modules whose forward users have registered as one linear map (`plywise.register_map`)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plywise.engine.capture.capture import Capture, ModelHook
from plywise.engine.capture.captured_call import apply_tapped
from plywise.engine.capture.graph import walk_graph
from plywise.engine.maps.layouts import PLAIN
from plywise.engine.maps.registered import Registration, check_map, find_registration
from plywise.engine.selection import strip_wrappers

ADAPTED = "its output holds more than the registered map (an adapter, a hook)"


def install_registered(model: nn.Module, capture: Capture) -> list[RemovableHandle]:
    """Hook the modules of ``model`` whose types are registered."""
    handles = []
    for name, module in model.named_modules():
        registration = find_registration(module)
        if registration is not None:
            hook = RegisteredHook(strip_wrappers(name), registration, capture)
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    return handles


class RegisteredHook(ModelHook):
    """Forward hook of a registered module: its output becomes that of a captured call."""

    def __init__(self, name: str, registration: Registration, capture: Capture) -> None:
        self.name = name
        self.registration = registration
        self.capture = capture
        self._map: Any = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Replace the output, unless something else than the map has made it."""
        weight = module._parameters.get(self.registration.weight)
        grad = isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()
        if weight is None or not grad or self.capture.paused:
            return None
        bias = module._parameters.get(self.registration.bias)
        x = self.registration.prepare(module, args[0] if args else next(iter(kwargs.values())))
        if self._map is None:
            self._map = self.registration.make_map(module)
        site = self.capture.find_site(weight, self._map, PLAIN, bias, x)
        if site is None:
            return None
        if not _holds_only(output, [weight, bias, x]):
            self.capture.leave_alone(site, ADAPTED)
            return None
        if not site.tested:
            check_map(self.name, self._map, x, weight, bias, output)
            site.tested = True
        site.entry.used_by.clear()  # by the calls inside, which this one stands for

        def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            made: Tensor = self._map.apply(a, w)
            return made if b is None else made + b

        inner = run(x, weight.detach(), None if bias is None else bias.detach())
        return apply_tapped(site, run, [output.detach(), _keep, ()], inner, weight, bias, x)


def _keep(x: Tensor) -> Tensor:
    return x


def _holds_only(output: Tensor, sources: list[Tensor | None]) -> bool:
    """Return whether autograd's graph leads from ``output`` to these tensors alone."""
    ends = {id(t) for t in sources if t is not None}
    edges = {t.grad_fn for t in sources if t is not None and t.grad_fn is not None}
    inside = walk_graph(output.grad_fn, edges.__contains__)
    return all(id(node.variable) in ends for node in inside if hasattr(node, "variable"))
