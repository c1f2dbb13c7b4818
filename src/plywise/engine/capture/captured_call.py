"""The nodes that represent a captured call in autograd's graph; their backward asks the rule.

`CapturedCall` runs the call itself and makes the gradient at its input. `TappedCall` stands beside autograd's
own graph, which makes that gradient. If the rule replaces the gradient at the input, a `RearrangedCall` takes
the place of a tap.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.call import Update
from plywise.engine.capture.masked_rows import get_active_masks
from plywise.engine.maps.layouts import PLAIN
from plywise.engine.passes import find_pass
from plywise.engine.sites import Site

Run = Callable[..., Tensor]
"""The call itself, a function of input (or inputs), weight and bias."""

Arrange = Callable[[Tensor], Tensor]
"""A function of one tensor."""

_grad_enabled = torch.is_grad_enabled
_is_mapped: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor holds several Δ at once, as ``torch.autograd.grad(is_grads_batched=True)`` makes it."""
_autocasts: Callable[[], bool] = torch._C._is_any_autocast_enabled
_will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
_count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
SELECTIVE = "_CachingTorchDispatchMode"
"""The mode in which torch runs what is in a selective checkpoint."""


class CapturedCall(torch.autograd.Function):
    """A call of a linear map whose input gradient the map itself can make (linear layers, convolutions)."""

    @staticmethod
    def forward(ctx: Any, site: Site, run: Run, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the call; keep what autograd would keep."""
        output = run(x, weight, bias)
        if _count_modes():
            ctx.is_passed_once = _is_passed_once()
        if (task := find_pass()) != -1:  # a checkpoint runs the call again
            ctx.made_in = task
        ctx.site, ctx.run, ctx.sends_below, ctx.masks = site, run, True, get_active_masks()
        ctx.has_bias = bias is not None and bias.requires_grad  # a frozen bias is a constant
        dtype, input_dtype = output.dtype, x.dtype
        ctx.input_dtype = None if dtype is input_dtype else input_dtype
        ctx.save_for_backward(x if dtype is input_dtype else x.to(dtype), weight)
        # a view made here could not be changed in place afterwards
        return output if output._base is None else output.detach()

    @staticmethod
    @leave_out(WHY_STEPS)
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Ask the rule for the update and for the gradient at the input."""
        a, weight = ctx.saved_tensors
        wants_below, wants_weight, wants_bias = find_wanted(ctx, 3)
        if _grad_enabled() or _is_mapped(delta):
            return _differentiate(ctx, a, weight, delta, (wants_below, wants_weight, wants_bias))
        update, below = _ask(ctx, a, weight, delta, wants_weight or wants_bias, wants_below)
        if below is not None and ctx.input_dtype is not None:
            below = below.to(ctx.input_dtype)
        return None, None, below, *_fit(ctx, update, weight, delta, wants_weight, wants_bias)


class TappedCall(torch.autograd.Function):
    """A call of a linear map beside autograd's own graph, which sends the gradient down.

    ``output`` was made by autograd from the detached weight; this node adds the weight's and the bias's
    edges. ``box`` holds the same numbers, because a tensor argument that is returned would count as a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        site: Site,
        run: Run,
        box: list[Any],
        output: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        """Return the output in ``box``; keep the tensors from which the map's input is made."""
        if _count_modes():
            ctx.is_passed_once = _is_passed_once()
        if (task := find_pass()) != -1:
            ctx.made_in = task
        ctx.site, ctx.run, ctx.sends_below, ctx.masks = site, run, False, get_active_masks()
        value, ctx.prepare, kept = box
        ctx.has_bias = bias is not None and bias.requires_grad
        ctx.input_count = len(inputs)
        ctx.save_for_backward(weight, *inputs, *kept)
        return value

    @staticmethod
    @leave_out(WHY_STEPS)
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Ask the rule for the update; send Δ, or the rule's value in its place, on to autograd's graph."""
        weight, *kept = ctx.saved_tensors
        wants_weight, wants_bias = find_wanted_of_tap(ctx)
        if _grad_enabled() or _is_mapped(delta):
            return _differentiate_tap(ctx, weight, kept, delta, (wants_weight, wants_bias))
        with torch.no_grad():
            a = _cast_input(ctx.prepare(*kept), delta)
        update, below = _ask(ctx, a, weight, delta, wants_weight or wants_bias, True)
        answers = _fit(ctx, update, weight, delta, wants_weight, wants_bias)
        return None, None, None, below, *answers, *[None] * ctx.input_count


class RearrangedCall(torch.autograd.Function):
    """A captured call whose input gradient a rule replaces, and whose plain one only torch makes bit for bit.

    Examples are products with strided inputs, einsums and transposed convolutions. If the plain gradient is
    wanted, the call is run again, and autograd differentiates it.

    ``arrange`` turns the call's input into the map's input, and ``restore`` turns a gradient at the map's
    input into one at the call's input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        site: Site,
        run: Run,
        arrange: Arrange,
        restore: Arrange,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Run the call; keep what autograd would keep."""
        ctx.prepare, ctx.restore = arrange, restore
        return CapturedCall.forward(ctx, site, run, x, weight, bias)

    @staticmethod
    @leave_out(WHY_STEPS)
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Ask the rule for the update and for the gradient at the input."""
        x, weight = ctx.saved_tensors
        wants_below, wants_weight, wants_bias = find_wanted(ctx, 3)
        if _grad_enabled() or _is_mapped(delta):
            return None, None, *_differentiate(ctx, x, weight, delta, (wants_below, wants_weight, wants_bias))
        a = ctx.prepare(x)
        update, below = _ask(ctx, a, weight, delta, wants_weight or wants_bias, wants_below)
        if wants_below:
            below = _run_again(ctx, x, weight, delta) if below is None else ctx.restore(below)
            if ctx.input_dtype is not None:
                below = below.to(ctx.input_dtype)
        return None, None, None, None, below, *_fit(ctx, update, weight, delta, wants_weight, wants_bias)


def _cast_input(a: Tensor, delta: Tensor) -> Tensor:
    """Return the map's input in the dtype in which the call used it: its output's, also under autocast."""
    return a.to(delta.dtype) if a.dtype is not delta.dtype and a.is_floating_point() else a


def _run_again(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """Return the plain gradient at the input of a call."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        # torch multiplies in another way, with other rounding, by a weight that requires no gradient
        output = ctx.run(point, weight.detach().to(x.dtype).requires_grad_(), None)
    return torch.autograd.grad(output, point, delta)[0]


apply_captured = super(torch.autograd.Function, CapturedCall).apply
"""``CapturedCall.apply`` without its check for torch.func, which `CaptureMode` has made."""
apply_tapped = super(torch.autograd.Function, TappedCall).apply
apply_rearranged = super(torch.autograd.Function, RearrangedCall).apply


def _ask(
    ctx: Any, a: Tensor, weight: Tensor, delta: Tensor, wants_update: bool, wants_below: bool
) -> tuple[Update, Tensor | None]:
    respond = ctx.site.responder.respond
    # autocast is meant for the network
    if _autocasts() and not delta.is_meta and torch.is_autocast_enabled(delta.device.type):
        with torch.autocast(delta.device.type, enabled=False):
            return respond(ctx, a, weight, delta, wants_update, wants_below)
    return respond(ctx, a, weight, delta, wants_update, wants_below)


def _fit(
    ctx: Any, update: Update, weight: Tensor, delta: Tensor, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return an update in the layout and dtype of the stored parameters."""
    site, of_bias = ctx.site, None
    of_weight = update.weight if wants_weight else None
    if of_weight is not None:
        if site.layout is not PLAIN or of_weight.dim() != weight.dim():
            of_weight = site.layout.from_canonical(of_weight, weight.shape)
        if of_weight.dtype is not weight.dtype:
            of_weight = of_weight.to(weight.dtype)
        if site.entry.compares:
            site.entry.add_answer(of_weight, weight)
    if wants_bias:
        of_bias = update.bias
        if of_bias is None:  # the bias is not part of the local problem: it gets its plain gradient
            of_bias = site.map.bias_gradient(delta)
        if site.bias_shape is not None:
            of_bias = of_bias.reshape(site.bias_shape)
        if of_bias.dtype is not weight.dtype:
            of_bias = of_bias.to(weight.dtype)
    return of_weight, of_bias


def _is_passed_once() -> bool:
    """Return whether a selective checkpoint runs now; its graph allows a single backward."""
    modes = map(torch._C._get_dispatch_stack_at, range(_count_modes()))
    return any(type(mode).__name__ == SELECTIVE for mode in modes)


def find_wanted(node: Any, count: int) -> list[bool]:
    """Return whether this backward needs the gradients of the last ``count`` arguments.

    Autograd says which inputs need a gradient at all. ``torch.autograd.grad`` and ``backward(inputs=...)``
    want only some of them. Autograd's engine knows which ones and drops the others, so they are not computed.
    """
    # a missing bias needs no gradient, and no edge stands for it
    needs, edges = node.needs_input_grad[-count:], node.next_functions
    try:
        return [needed and _will_execute(edges[place][0]) for place, needed in enumerate(needs)]
    except RuntimeError:  # of some the engine does not say it
        return [needed and _is_executed(edges[place][0]) for place, needed in enumerate(needs)]


def find_wanted_of_tap(node: Any) -> tuple[bool, bool]:
    """Do as `find_wanted`, for the weight and the bias of a `TappedCall`."""
    needs, edges = node.needs_input_grad, node.next_functions
    wants_weight = needs[4] and _is_executed(edges[1][0])
    return wants_weight, needs[5] and _is_executed(edges[2][0])


def _is_executed(source: Any) -> bool:
    """Return whether the running backward goes on to ``source``; true where the engine does not say."""
    try:
        return _will_execute(source)
    except RuntimeError:  # the engine refuses leaves that torch.autograd.grad asks for: they are wanted
        return True


# ---- a backward that is differentiated itself, or mapped over several Δ ------------------------------


def _differentiate(
    ctx: Any, x: Tensor, weight: Tensor, delta: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Answers of a backward with ``create_graph=True``, or of several Δ at once (``is_grads_batched=True``).

    The gradient at the input is autograd's own, with its graph. The update has the rule's value and the
    derivative of the plain gradient, because a rule's update has no derivative of its own. With several Δ at
    once, the update is the plain gradient: they make the rows of a Jacobian, and no step uses them.
    """
    wants_below, wants_weight, wants_bias = wanted
    sources = [t for t, wants in ((x, wants_below), (weight, wants_weight)) if wants]
    below = of_weight = None
    if sources:
        found = _differentiate_run(ctx, (x, weight), sources, delta)
        below = found.pop(0) if wants_below else None
        of_weight = found.pop(0) if wants_weight else None
    with torch.no_grad():
        a = ctx.prepare(x) if hasattr(ctx, "prepare") else x
    parts = _carry_rule(ctx, a, weight, delta, of_weight, wants_weight, wants_bias)
    return None, None, below, *parts


def _differentiate_tap(
    ctx: Any, weight: Tensor, kept: list[Tensor], delta: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    wants_weight, wants_bias = wanted
    inputs = kept[: ctx.input_count]
    needed = [x for x in inputs if x.requires_grad]
    sources = [*needed, *([weight] if wants_weight else [])]
    found: list[Tensor] = []
    if sources:
        found = _differentiate_run(ctx, (*inputs, weight), sources, delta)
    of_weight = found.pop() if wants_weight else None
    below = [found.pop(0) if x.requires_grad else None for x in inputs]
    with torch.no_grad():
        a = _cast_input(ctx.prepare(*kept), delta)
    parts = _carry_rule(ctx, a, weight, delta, of_weight, wants_weight, wants_bias)
    return None, None, None, None, *parts, *below


def _differentiate_run(
    ctx: Any, inputs: tuple[Tensor, ...], sources: list[Tensor], delta: Tensor
) -> list[Tensor]:
    """Autograd's gradients of the call, made again; they have a graph where the backward makes one."""
    makes_graph = _grad_enabled()
    with torch.enable_grad():
        output = ctx.run(*inputs, None)
    found = torch.autograd.grad(output, sources, delta, create_graph=makes_graph, materialize_grads=True)
    return list(found)


def _carry_rule(
    ctx: Any,
    a: Tensor,
    weight: Tensor,
    delta: Tensor,
    of_weight: Tensor | None,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the rule's values on the graphs of the plain gradients; for several Δ, the plain gradients."""
    of_bias = ctx.site.map.bias_gradient(delta) if wants_bias else None
    if of_bias is not None and ctx.site.bias_shape is not None:
        of_bias = of_bias.reshape(ctx.site.bias_shape)
    ctx.site.entry.stop_comparing()  # a second derivative is no answer of the rule
    if _is_mapped(delta):
        return of_weight, of_bias
    with torch.no_grad():
        update, _ = _ask(ctx, a.detach(), weight.detach(), delta.detach(), wants_weight or wants_bias, False)
        values = _fit(ctx, update, weight, delta, wants_weight, wants_bias)
    first, second = (
        plain if plain is None or value is None else plain + (value - plain.detach())
        for plain, value in zip((of_weight, of_bias), values, strict=True)
    )
    return first, second
