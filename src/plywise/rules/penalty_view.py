"""The penalty function behind ProxProp: backpropagation as a sweep of gradient descent over layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from plywise._util.checks import is_number, require_kind
from plywise.engine.contract import RuleContract
from plywise.engine.rule import Rule

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Lifted:
    """The activations of a network as variables of their own.

    Attributes:
        z: the outputs of all maps but the last one.
        a: the inputs of all maps; ``a[0]`` is the data, ``a[l + 1]`` belongs to ``z[l]``.
    """

    z: tuple[Tensor, ...]
    a: tuple[Tensor, ...]


class PenaltyView:
    """The penalty function E of ProxProp's paper, and sweeps of descent over it.

    A network ``φ_K ∘ σ ∘ φ_{K-1} ∘ ... ∘ σ ∘ φ_1`` has the lifted variables ``z_l = φ_l(a_{l-1})`` and
    ``a_l = σ_l(z_l)``, with ``a_0`` the data. If they are free to differ from these values, the loss
    becomes::

        E = loss(φ_K(a_{K-1}), y) + Σ_{l<K} γ/2 ‖σ_l(z_l) - a_l‖² + ρ/2 ‖φ_l(a_{l-1}) - z_l‖²

    Norms are summed over the batch. A sweep goes from the last layer down. Each variable takes a gradient
    step of size τ on E, at the new values of the variables above it: first ``a_{K-1}`` and the last weights,
    then for each layer ``z_l``, and after it ``a_{l-1}`` and the weights together.

    With ``ρ = γ = 1/τ`` a forward pass and a sweep are one step of backpropagation with rate τ (Proposition
    1 of the paper). Other values multiply the step of the layer that is k below the last one by ``(τ²ργ)^k``.
    With a rule the weights below the last layer move by τρ times the rule's update of
    ``½‖φ_l(a_{l-1}) - z_l‖²``: ``rule=ProxProp(tau_theta)`` makes their step proximal, which is ProxProp
    (Proposition 2).

    Source: Frerix, Möllenhoff, Moeller, Cremers, "Proximal Backpropagation", ICLR 2018, eqs. 3 and 7-12.

    Args:
        model: a chain of modules. A module with parameters begins a layer; the modules without parameters
            behind it are its σ. Those behind the last layer belong to the loss, those before the first one
            to the data.
        loss: takes the model's output and the targets, and gives a scalar.
        tau: step size τ of the sweep. Range 1e-4 to 10.
        rho: weight ρ of ``‖φ_l(a_{l-1}) - z_l‖²``. Default ``1/tau``.
        gamma: weight γ of ``‖σ_l(z_l) - a_l‖²``. Default ``1/tau``.
        rule: how the weights below the last layer move; None for gradient descent.

    Raises:
        ValueError: a number is not positive, the model has no layer or draws random numbers (dropout in
            training), or the rule has a running state or alters the gradient that it sends down.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 2
        >>> view = pw.PenaltyView(model, torch.nn.functional.cross_entropy, tau=0.1, rule=pw.ProxProp(1.0))
        >>> lifted = view.lift(x)
        >>> before = view.energy(lifted, y)
        >>> after = view.energy(view.sweep(lifted, y), y)
        >>> bool(after < before)
        True
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss: Loss,
        tau: float,
        *,
        rho: float | None = None,
        gamma: float | None = None,
        rule: Rule | None = None,
    ) -> None:
        require_kind(self, "model", model, nn.Sequential, "an nn.Sequential")
        numbers = [value for value in (tau, rho, gamma) if value is not None]
        if not all(is_number(value) and value > 0 for value in numbers) or tau is None:
            raise ValueError(f"tau, rho and gamma must be positive, not {tau!r}, {rho!r}, {gamma!r}.")
        self.tau = tau
        self.rho = 1 / tau if rho is None else rho
        self.gamma = 1 / tau if gamma is None else gamma
        self.rule = rule
        self.loss = loss
        if isinstance(rule, RuleContract) and (rule.remembers or rule.alters_backward):
            raise ValueError(
                f"A sweep needs a rule of one batch that sends plain gradients down, not {rule}: attach it "
                "to the model and an optimizer instead."
            )
        self.maps: list[nn.Module] = []
        self.activations: list[nn.Sequential] = []
        start = nn.Sequential()
        for module in _flatten(model):
            if isinstance(module, _DropoutNd) and module.training and module.p:
                raise ValueError("E must have one value: call eval() on the model's dropout first.")
            if any(True for _ in module.parameters()):
                self.maps.append(module)
                self.activations.append(nn.Sequential())
            else:
                (self.activations[-1] if self.maps else start).append(module)
        self._start = start
        if not self.maps:
            raise ValueError("The model has no module with parameters, so that there is no layer to move.")

    def lift(self, x: Tensor) -> Lifted:
        """Run a forward pass: the variables at which all penalties are zero, detached.

        Args:
            x: a batch of the model's inputs, (samples, ...).
        """
        z, a = [], [self._start(x).detach()]
        with torch.no_grad():
            for layer, activation in zip(self.maps[:-1], self.activations, strict=False):
                z.append(layer(a[-1]))
                a.append(activation(z[-1]))
        return Lifted(tuple(z), tuple(a))

    def energy(self, lifted: Lifted, y: Tensor) -> Tensor:
        """E, a scalar that can be differentiated in the variables and the parameters.

        Args:
            lifted: the variables.
            y: the targets of the batch.
        """
        total = self._top_loss(lifted.a[-1], y)
        for layer, z in enumerate(lifted.z):
            total = total + self._pull(layer, z, lifted.a[layer + 1])
            total = total + self.rho * self._measure_miss(layer, lifted.a[layer], z)
        return total

    def sweep(self, lifted: Lifted, y: Tensor) -> Lifted:
        """Move all variables and the model's parameters once, from the last layer down.

        Args:
            lifted: the variables before, from `lift` or from the sweep before.
            y: the targets of the batch.

        Returns:
            The variables after; the parameters have been changed in place, ``.grad`` has not.
        """
        z, a = list(lifted.z), list(lifted.a)
        top = len(self.maps) - 1
        moves: list[tuple[Tensor, Tensor]] = []
        for layer in range(top, -1, -1):
            if layer < top:
                z[layer] = self._move_outputs(layer, a[layer], z[layer], a[layer + 1])
            scale = self.tau if layer == top else self.tau * self.rho
            slope, updates = self._differentiate(layer, a[layer], y if layer == top else z[layer])
            moves += [(parameter, scale * update) for parameter, update in updates]
            if layer > 0:
                with torch.no_grad():
                    pulled = self.gamma * (a[layer] - self.activations[layer - 1](z[layer - 1]))
                a[layer] = a[layer] - self.tau * pulled - scale * slope
        with torch.no_grad():
            for parameter, move in moves:
                parameter -= move
        return Lifted(tuple(z), tuple(a))

    def _move_outputs(self, layer: int, below: Tensor, z: Tensor, above: Tensor) -> Tensor:
        """``z_l`` after its step, with the new ``a_l`` above it."""
        z = z.detach().requires_grad_()
        energy = self._pull(layer, z, above) + self.rho * self._measure_miss(layer, below, z)
        (slope,) = torch.autograd.grad(energy, z)
        return z.detach() - self.tau * slope

    def _differentiate(
        self, layer: int, a: Tensor, target: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the gradient at a layer's input (0 at the data), and the updates of its parameters."""
        is_top = layer == len(self.maps) - 1
        rule = None if is_top else self.rule
        parameters = [p for p in self.maps[layer].parameters() if p.requires_grad]
        a = a.detach().requires_grad_(layer > 0)
        if rule is not None:
            rule.attach(self.maps[layer])
        try:
            local = self._top_loss(a, target) if is_top else self._measure_miss(layer, a, target)
            slopes = list(torch.autograd.grad(local, [*([a] if layer > 0 else []), *parameters]))
        finally:
            if rule is not None:
                rule.detach()
        slope = slopes.pop(0) if layer > 0 else torch.zeros((), device="cpu")
        return slope, list(zip(parameters, slopes, strict=True))

    def _top_loss(self, a: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.activations[-1](self.maps[-1](a)), y)

    def _pull(self, layer: int, z: Tensor, a: Tensor) -> Tensor:
        """``γ/2 ‖σ_l(z_l) - a_l‖²``."""
        return self.gamma / 2 * (self.activations[layer](z) - a).square().sum()

    def _measure_miss(self, layer: int, a: Tensor, z: Tensor) -> Tensor:
        """``½ ‖φ_l(a_{l-1}) - z_l‖²``."""
        return 0.5 * (self.maps[layer](a) - z).square().sum()


def _flatten(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a chain in order, chains in chains written out."""
    if not isinstance(model, nn.Sequential):
        yield model
        return
    for module in model:
        yield from _flatten(module)
