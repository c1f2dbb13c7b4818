"""slope_recovery: a loss term that makes adaptive activations steeper."""

import math

import torch
from torch import Tensor, nn

from plywise._util.checks import require_kind
from plywise.errors import PlywiseError
from plywise.nn.adaptive_activation import AdaptiveActivation


def slope_recovery(model: nn.Module) -> Tensor:
    """The slope recovery term of a network with adaptive activations.

    Idea: steeper activations pass on larger gradients. This term falls as slopes grow, so it increases the
        slopes while the rest of the loss has little effect on them, and it vanishes once they are large.
    Equation: S = 1 / mean_k exp(mean_i slope_k,i), over the adaptive activations k and the slopes i of each;
        add W_a · S to the loss.
    Use when: activations adapt layer by layer or neuron by neuron and training is slow at first; the paper's
        weights W_a are 1, 10 and 20.
    Do not use when: slopes keep growing while the error no longer falls. S has its minimum at infinite
        slopes, so only the other terms of the loss limit them. Lower its weight, or leave it out.
    Layers: every `plywise.nn.AdaptiveActivation` of the model.
    Cost: one exponential for each activation, which is negligible beside a step.
    Status: faithful to the paper. The paper's published script for function fitting sums over layers instead
        of averaging: it omits the factor 1/(D-1).
    Source: Jagtap, Kawaguchi, Karniadakis, "Locally adaptive activation functions with slope recovery for
        deep and physics-informed neural networks", Proceedings of the Royal Society A, 2020 (arXiv
        1909.12228).
    Code: AmeyaJagtap/Locally-Adaptive-Activation-Functions-Neural-Networks-
    Results: the paper reports it together with `plywise.nn.AdaptiveActivation`. Ours are from
        ``benchmarks/physics_informed.py`` (medians of three seeds). With one slope for each layer and the
        paper's weight of 20, the error on Burgers rose from 0.131 to 0.748, and slopes grew to between 5 and
        16 times their initial value. With a weight of 10 on an inverse Poisson problem, the error fell from
        0.077 to 0.071, which is less than the difference between seeds.
    Limits: S depends on the slopes alone, not on n: with n = 10 slopes begin at 0.1, S at 0.905.

    Args:
        model: a model with adaptive activations. A slope that several of them share counts once for each.

    Returns:
        S, a scalar between 0 and 1 for slopes above 0, with gradients to the slopes.

    Raises:
        PlywiseError: the model has no adaptive activation.

    Example:
        >>> import torch
        >>> from plywise.losses import slope_recovery
        >>> from plywise.nn import adapt_activations
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> slopes = adapt_activations(model, kind="layer")
        >>> loss = model(torch.ones(4, 2)).square().mean() + 10 * slope_recovery(model)
        >>> loss.backward()
        >>> f"{slope_recovery(model).item():.6f}"  # 1/e
        '0.367879'
    """
    require_kind("slope_recovery", "model", model, nn.Module, "a torch.nn.Module")
    means = [module.slope.mean() for module in model.modules() if isinstance(module, AdaptiveActivation)]
    if not means:
        raise PlywiseError(
            f"slope_recovery: this {type(model).__name__} has no adaptive activation. Make them with "
            "plywise.nn.adapt_activations(model) first, or leave the term out."
        )
    # computed with logarithms, so that slopes above 88 give 0 and a gradient of 0, not NaN
    return (math.log(len(means)) - torch.logsumexp(torch.stack(means), 0)).exp()
