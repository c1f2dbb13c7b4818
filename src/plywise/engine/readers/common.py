"""What readers share: their arguments, and the capture of a call beside autograd's own graph."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.captured_call import apply_rearranged, apply_tapped

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Reader = Callable[[Capture, Any, Args, Kwargs], Any]


def pick_argument(args: Args, kwargs: Kwargs, place: int, name: str, default: Any = None) -> Any:
    """Return an argument given by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def keep_input(x: Tensor) -> Tensor:
    """Return the input: the map reads it as it is."""
    return x


def tap(
    capture: Capture,
    site: Any,
    run: Any,
    prepare: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_product: bool = False,
    restore: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Capture a call whose input gradient is left to autograd, unless the rule replaces it.

    Args:
        capture: the capture.
        site: where the call belongs.
        run: the call itself.
        prepare: makes the map's input from ``x``, in backward.
        x: the call's input.
        weight: its weight.
        bias: its bias.
        is_product: whether it is a matrix product, which torch makes in another way, with other rounding, for
            a weight that requires no gradient.
        restore: turns a gradient at the map's input, which a rule has altered, into one at ``x``. None for
            maps without such a gradient: there autograd sends on what the rule has made of Δ above.
    """
    if restore is not None and capture.alters:
        return apply_rearranged(site, run, prepare, restore, x, weight, bias)
    bare, bare_bias = leave_graph(weight, bias)
    if is_product and weight.requires_grad:
        bare.requires_grad_()
    output = run(x, bare, bare_bias)
    box = [output.detach(), prepare, ()]
    return apply_tapped(site, run, box, output, weight, bias, x)


def leave_graph(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias without their edges in the graph, for a call that autograd differentiates.

    Their gradients arrive before the node of that call has run. If a hook of somebody else waits for one (an
    optimizer that steps in backward), a copy is returned, since the node needs it as it was.
    """
    return _leave(weight), None if bias is None else _leave(bias)


def _leave(parameter: Tensor) -> Tensor:
    hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)
    others = [hook for hook in hooks.values() if not getattr(hook, "only_looks", False)] if hooks else []
    return parameter.detach().clone() if others else parameter.detach()
