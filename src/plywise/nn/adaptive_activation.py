"""AdaptiveActivation: activations with a trainable slope."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plywise._util.checks import require_kind
from plywise._util.modes import evaluating
from plywise.errors import PlywiseError

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,  # and ReLU6, a kind of it
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
"""The classes that `adapt_activations` replaces: torch's elementwise activations without parameters."""

Kind = Literal["global", "layer", "neuron"]


class AdaptiveActivation(nn.Module):
    """An activation with a trainable slope (GAAF, L-LAAF, N-LAAF).

    Idea: how steep an activation should be is not known beforehand, so it is learned together with the
        weights: one slope for the network, for each hidden layer, or for each neuron. A slope multiplies the
        gradient of all weights before it, so it acts as an additional step size for them. The fixed factor n
        lets slopes change faster than the weights at the same learning rate.
    Equation: h = activation(n · slope · z), slope = 1/n at the start, so the network computes the same as
        before. `plywise.losses.slope_recovery` in the loss increases the slopes.
    Use when: a small tanh network, for example a physics-informed one, fits a steep or oscillating function
        too slowly.
    Do not use when: the activation scales with its input, like ReLU: then a slope only rescales the weights,
        which is the same as another learning rate.
    Layers: it replaces elementwise activation modules, not functions that a forward calls.
    Cost: one product of the size of the activation in forward, two in backward; one parameter for the
        network, for each layer, or for each neuron.
    Status: faithful: equation, start and the mean over a layer's neurons in the slope recovery term are the
        paper's.
    Source: Jagtap, Kawaguchi, Karniadakis, "Locally adaptive activation functions with slope recovery for
        deep and physics-informed neural networks", Proceedings of the Royal Society A, 2020 (arXiv
        1909.12228).
    Code: AmeyaJagtap/Locally-Adaptive-Activation-Functions-Neural-Networks-
    Results: the paper's: relative L2 error on an inverse Poisson problem 0.1012 (fixed), 0.01654 (GAAF),
        0.00733 (L-LAAF), 0.01482 (N-LAAF); Burgers in 14,750, 13,600, 11,090 and 11,170 iterations. Ours are
        from ``benchmarks/physics_informed.py`` (fewer iterations; points and the Poisson problem are our own;
        medians of three seeds). Poisson: 0.072, 0.077, 0.071, 0.071, which differ less than seeds do. Burgers
        after 8000 iterations: 0.226, 0.157, 0.748, 0.451. L-LAAF without slope recovery reached 0.131, and
        fell below 0.2 after 1700 to 2600 iterations (fixed: 3300 to 5400). With slope recovery at the paper's
        weight of 20, slopes rose to between 3 and 17 times their initial value, and the solution became
        wrong. So slopes helped on Burgers, but we did not see the paper's order of methods.
    Limits: slopes may grow without bound under slope recovery (see the results), and shrink under weight
        decay: give them a parameter group without decay (their names end in "slope"). Nothing prevents a
            negative slope, which mirrors the activation. A module that several layers call has one slope for
            all of them.

    Args:
        activation: the activation, any module whose output is elementwise in its input.
        shape: shape of the slope, broadcast against the input from its last dimension on: ``()`` for one
            slope, ``(d,)`` for d neurons, ``(C, 1, 1)`` for channels, ``(C, H, W)`` for channels and pixels
            (the paper's neuron-wise). Default ().
        n: fixed factor; the paper uses 1, 2, 5 and 10. Default 1. Range 1 to 10.
        device: the device of the slope. Default None, torch's default.
        dtype: the dtype of the slope. Default None, torch's default.

    Raises:
        ValueError: ``n`` is not a finite number of at least 1, or ``shape`` holds anything but whole numbers
            above 0.

    Example:
        >>> import torch
        >>> from plywise.nn import AdaptiveActivation
        >>> tanh = AdaptiveActivation(torch.nn.Tanh(), n=10)
        >>> tanh.slope.item()
        0.10000000149011612
        >>> z = torch.linspace(-2, 2, 5)
        >>> torch.allclose(tanh(z), z.tanh())
        True
    """

    def __init__(
        self,
        activation: nn.Module,
        shape: Sequence[int] = (),
        n: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_factor(n)
        require_kind(self, "shape", shape, Sequence, "a tuple of whole numbers")
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"AdaptiveActivation: shape must be whole numbers above 0, not {tuple(shape)}.")
        self.activation = activation
        self.n = n
        self.slope = nn.Parameter(torch.full(tuple(shape), 1 / n, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Compute ``activation(n · slope · z)``, in the shape of ``z``."""
        return self.activation(self.n * self.slope * z)

    def extra_repr(self) -> str:
        """Show factor and shape of the slope."""
        return f"n={self.n:g}, slope={tuple(self.slope.shape)}"


def adapt_activations(
    model: nn.Module,
    kind: Kind = "layer",
    n: float = 1.0,
    example: Tensor | tuple[Any, ...] | None = None,
    types: tuple[type[nn.Module], ...] = ACTIVATIONS,
) -> list[AdaptiveActivation]:
    """Put an `AdaptiveActivation` around each activation module of ``model``, in place.

    The model still computes the same (up to the rounding of n · 1/n). Make the optimizer afterwards, so that
    it includes the slopes.

    Args:
        model: the model. An activation that it calls as a function (``F.relu``) is not found.
        kind: ``"global"`` for one slope in the whole network (GAAF), ``"layer"`` for one at each activation
            (L-LAAF), ``"neuron"`` for one for each element of an activation's input for one sample (N-LAAF).
        n: fixed factor, see `AdaptiveActivation`. Default 1. Range 1 to 10.
        example: a batch of inputs, or a tuple of the model's positional arguments. ``"neuron"`` needs it to
            find the shapes. If it is given, a module that several layers use is refused. The model runs on it
            once, in eval mode, without gradients.
        types: the classes of activations; add your own by ``(*ACTIVATIONS, Sine)``.

    Returns:
        The new modules, in the order in which the model registers them.

    Raises:
        ValueError: ``kind`` or ``n`` is out of range.
        PlywiseError: there is nothing to adapt, the model is adapted already, ``"neuron"`` has no example,
            or with the example an activation runs several times, or not at all.

    Example:
        >>> import torch
        >>> from plywise.nn import adapt_activations
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> adapt_activations(model, kind="neuron", n=5, example=torch.zeros(1, 2))
        [AdaptiveActivation(
          n=5, slope=(20,)
          (activation): Tanh()
        )]
        >>> slopes = [p for name, p in model.named_parameters() if name.endswith("slope")]
        >>> weights = [p for name, p in model.named_parameters() if not name.endswith("slope")]
        >>> groups = [{"params": weights}, {"params": slopes, "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    """
    if kind not in ("global", "layer", "neuron"):
        raise ValueError(f"adapt_activations: kind must be 'global', 'layer' or 'neuron', not {kind!r}.")
    _require_factor(n)
    if kind == "neuron" and example is None:
        raise PlywiseError(
            "adapt_activations: kind='neuron' needs a slope of the shape of each layer's output, which is "
            "known only when the model has run. Give example=, a batch of inputs."
        )
    places = _find_activations(model, types)
    where = _find_device(model)
    adapted = {name: AdaptiveActivation(activation, (), n, **where) for name, activation in places.items()}
    _put(model, adapted)
    if example is not None:
        try:
            shapes = _find_shapes(model, adapted, example)
        except BaseException:
            _put(model, places)  # whatever the model raised, it is left unchanged
            raise
    if kind == "neuron":
        for name, module in adapted.items():
            module.slope = nn.Parameter(module.slope.detach().expand(shapes[name]).clone())
    first, *others = adapted.values()
    if kind == "global":
        for module in others:
            module.slope = first.slope
    return [first, *others]


def _require_factor(n: float) -> None:
    if not (isinstance(n, int | float) and not isinstance(n, bool) and 1 <= n < math.inf):
        raise ValueError(f"AdaptiveActivation: n must be a finite number of at least 1, not {n!r}.")


def _find_activations(model: nn.Module, types: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """Find activations by name. A module at two places is listed twice, and gets two slopes."""
    require_kind("adapt_activations", "model", model, nn.Module, "a torch.nn.Module")
    if any(isinstance(module, AdaptiveActivation) for module in model.modules()):
        raise PlywiseError(
            f"adapt_activations: this {type(model).__name__} has adaptive activations already. Adapt it once."
        )
    if isinstance(model, types):
        raise PlywiseError(
            "adapt_activations: the model is a single activation, which cannot be replaced within itself. "
            "Make an AdaptiveActivation of it."
        )
    # a place is an attribute of a module: a block that the model holds under two names counts once
    places = {
        f"{parent}.{name}" if parent else name: child
        for parent, module in model.named_modules()
        for name, child in module._modules.items()
        if isinstance(child, types)
    }
    if not places:
        raise PlywiseError(
            f"adapt_activations: this {type(model).__name__} has no activation module. If its forward calls "
            "a function such as F.relu, make it a module (torch.nn.ReLU); if it has activations of a class "
            "of your own, name the class in types=(*ACTIVATIONS, YourActivation)."
        )
    return places


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)


def _find_shapes(
    model: nn.Module, adapted: dict[str, AdaptiveActivation], example: Tensor | tuple[Any, ...]
) -> dict[str, tuple[int, ...]]:
    """Find the shape of one sample at each activation, by a forward on ``example``."""
    calls: dict[str, list[tuple[int, ...]]] = {name: [] for name in adapted}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: calls[name].append(tuple(args[0].shape[1:]))
        )
        for name, module in adapted.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in calls.items():
        if len(seen) != 1:
            raise PlywiseError(
                f"adapt_activations: {type(adapted[name].activation).__name__} {name!r} ran {len(seen)} "
                "times on the example, not once: whose slope it would be is not known. Give each layer an "
                "activation module of its own, and take out those that the forward does not use."
            )
    return {name: seen[0] for name, seen in calls.items()}


def _find_device(model: nn.Module) -> dict[str, Any]:
    """Find device and dtype for the slopes: those of the model's first floating-point parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}
