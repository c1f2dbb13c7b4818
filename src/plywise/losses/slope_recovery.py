"""slope_recovery: a loss term that pulls the slopes of adaptive activations up."""

import math

import torch
from torch import Tensor, nn

from plywise.errors import PlywiseError
from plywise.nn.adaptive_activation import AdaptiveActivation


def slope_recovery(model: nn.Module) -> Tensor:
    """The slope recovery term of a network with adaptive activations.

    Idea: steeper activations pass larger gradients on. A term that falls as slopes grow pushes them up while
        the rest of the loss says little, and fades as they have grown.
    Equation: S = 1 / mean_k exp(mean_i slope_k,i), over the adaptive activations k and the slopes i of each;
        add W_a · S to the loss.
    Use when: activations adapt layer by layer or neuron by neuron and training is slow at first; the paper's
        weights W_a are 1, 10 and 20.
    Do not use when: slopes grow on and on while the error no longer falls: S is least at infinite slopes, so
        nothing but the other terms holds them. Lower its weight, or leave it out.
    Layers: every `plywise.nn.AdaptiveActivation` of the model.
    Cost: one exponential for each activation; nothing next to a step.
    Status: faithful to the paper; its published script for function fitting omits 1/(D-1), the mean over
        layers, and takes the sum.
    Source: Jagtap, Kawaguchi, Karniadakis, "Locally adaptive activation functions with slope recovery for
        deep and physics-informed neural networks", Proceedings of the Royal Society A, 2020 (arXiv
        1909.12228).
    Code: AmeyaJagtap/Locally-Adaptive-Activation-Functions-Neural-Networks-
    Results: the paper reports it together with `plywise.nn.AdaptiveActivation`. Ours, of
        ``benchmarks/physics_informed.py`` (three seeds, medians): with a slope a layer and the paper's weight
        of 20 on Burgers it raised the error from 0.131 to 0.748 and slopes to 5 to 16 times the start; with
        10 on an inverse Poisson problem 0.077 became 0.071, less than seeds differ.
    Limits: S depends on the slopes alone, not on n: with n = 10 slopes begin at 0.1, S at 0.905.

    Args:
        model: a model with adaptive activations. One slope that several of them share counts in each.

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
    means = [module.slope.mean() for module in model.modules() if isinstance(module, AdaptiveActivation)]
    if not means:
        raise PlywiseError(
            f"slope_recovery: this {type(model).__name__} has no adaptive activation. Make them with "
            "plywise.nn.adapt_activations(model) first, or leave the term out."
        )
    # by logarithms, so that slopes beyond 88 give 0 and a gradient of 0, not NaN
    return (math.log(len(means)) - torch.logsumexp(torch.stack(means), 0)).exp()
