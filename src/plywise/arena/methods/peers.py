"""The established optimizers that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.modes import evaluating
from plywise.arena.method import Method, Numbers, Trainer, TrialContext, end_to_end, of_class
from plywise.arena.methods import NULL_CONTROL, PEERS
from plywise.arena.space import Range, Space
from plywise.errors import PlywiseError
from plywise.registry.resolve import resolve_optimizer

GRADIENT_SIZED: Space = {"lr": Range(1e-3, 1.0, 0.07), "weight_decay": Range(1e-6, 1e-2, 1e-4)}
"""Of optimizers whose steps are as large as the gradient, the decay added to it."""


def unit_sized(rate: float) -> Space:
    """Of optimizers whose steps have a size of their own, the decay apart from it (decoupled)."""
    return {"lr": Range(1e-4, 1e-1, rate), "weight_decay": Range(1e-4, 1.0, 1e-2)}


@dataclass(frozen=True)
class Peer:
    """An optimizer, and what may be tuned about it.

    Attributes:
        name: the method's name.
        about: one line.
        space: its tuned numbers; its rate is ``lr``.
        make: makes it from a setting and its numbers.
        needs: a package that it comes from and plywise does not bring, or nothing.
    """

    name: str
    about: str
    space: Space
    make: Callable[[TrialContext, Numbers], Optimizer]
    needs: str = ""


# ---- the optimizers --------------------------------------------------------------------------------


def nesterov(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """SGD with Nesterov momentum 0.9."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


class MuonAdamW(Optimizer):
    """torch's Muon for hidden weights and AdamW for the rest, as one optimizer.

    torch's Muon takes matrices only: the weight of a convolution is flattened to one row a channel. Its rate
    is scaled so that its steps are as large as AdamW's (``adjust_lr_fn="match_rms_adamw"``), and one rate
    does for both.

    Args:
        hidden: weights for Muon, of two dimensions or more; see `hidden_weights`.
        rest: parameters for AdamW.
        lr: rate of both.
        weight_decay: of both, apart from the gradient.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        >>> optimizer = MuonAdamW([model[0].weight], [model[0].bias, *model[2].parameters()], lr=1e-3)
        >>> model(torch.ones(2, 1, 3, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        hidden: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        muon: Callable[..., Optimizer] = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        parts = [(muon, list(hidden)), (torch.optim.AdamW, list(rest))]
        parts = [(make, parameters) for make, parameters in parts if parameters]
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([{"params": parameters} for _, parameters in parts], defaults)
        self._parts = [make([_matrix(p) for p in parameters], **defaults) for make, parameters in parts]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, part in zip(self.param_groups, self._parts, strict=True):
            (inner,) = part.param_groups
            inner.update(lr=group["lr"], weight_decay=group["weight_decay"])
            pairs = [
                pair
                for pair in zip(group["params"], inner["params"], strict=True)
                if pair[0].grad is not None
            ]
            for outer, matrix in pairs:
                part.state[matrix] = self.state[outer]  # the same dict: state_dict() is that of any optimizer
                if matrix is not outer:
                    matrix.copy_(outer.flatten(1))
                    matrix.grad = outer.grad.flatten(1)
            part.step()
            for outer, matrix in pairs:
                if matrix is not outer:
                    matrix.grad = None
                    outer.copy_(matrix.view_as(outer))
        return loss


def _matrix(parameter: nn.Parameter) -> nn.Parameter:
    """What stands for a parameter in Muon or AdamW: itself, or where it has too many dimensions a copy."""
    return parameter if parameter.dim() <= 2 else nn.Parameter(parameter.detach().flatten(1).clone())


_LINEAR_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.RNNBase)


def hidden_weights(model: nn.Module, example: Tensor) -> list[nn.Parameter]:
    """The weights that Muon is made for: of linear maps, but not the one that gives the output.

    Embeddings, whatever is tied to them, norms, biases and bare parameters are not among them. The output
    layer is the one that runs last: one forward, in eval mode, shows which.

    Args:
        model: the model. It stays as it is.
        example: a few inputs.
    """
    maps = [module for module in model.modules() if isinstance(module, _LINEAR_MAPS)]
    ran: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in maps]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    others = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    apart = {id(p) for module in (*others, *ran[-1:]) for p in module.parameters()}
    found = {
        id(p): p
        for module in maps
        for name, p in module.named_parameters(recurse=False)
        if "weight" in name and p.dim() > 1 and p.requires_grad and id(p) not in apart
    }
    return list(found.values())


def soap(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """SOAP with its defaults: a new eigenbasis every 10 steps."""
    made: Optimizer = _package("soap").SOAP(parameters, lr=lr, weight_decay=weight_decay)
    return made


def shampoo(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, every: int = 25
) -> Optimizer:
    """Shampoo grafted onto SGD, its roots anew every 25 steps (its default, 1000, is more than a run)."""
    made: Optimizer = _package("shampoo").ScalableShampoo(
        parameters,
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        start_preconditioning_step=every,
        preconditioning_compute_steps=every,
    )
    return made


def _package(method: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise PlywiseError(
            f"Method {method} needs the package pytorch_optimizer ({error}): pip install 'plywise[bench]'.",
            see="error-extra",
        ) from error
    return pytorch_optimizer


# ---- as methods ------------------------------------------------------------------------------------


def find_peer(name: str) -> Peer:
    """The peer called ``name``, or of the optimizer's class at the address ``name``.

    Raises:
        PlywiseError: there is nothing at the address, or no optimizer.
    """
    if name in PEERS:
        return _PEERS[name]
    optimizer = resolve_optimizer(name)
    method = of_class(name, optimizer)
    return Peer(name, method.about, method.space, _plain(optimizer))


def of_peer(name: str) -> Method:
    """A peer, or the null control, as a method."""
    if name == NULL_CONTROL:
        about = "SGD a second time: the null control"
        return replace(of_peer(PEERS[0]), name=name, about=about, baseline=False, null=PEERS[0])
    peer = _PEERS[name]

    def make(setting: TrialContext) -> Trainer:
        return end_to_end(setting, peer.make(setting, setting.numbers))

    return Method(name, peer.about, peer.space, make, baseline=True, needs=peer.needs)


def _plain(optimizer: Callable[..., Optimizer]) -> Callable[[TrialContext, Numbers], Optimizer]:
    """An optimizer that treats all parameters alike."""

    def make(setting: TrialContext, numbers: Numbers) -> Optimizer:
        return optimizer(learning(setting.model), **numbers)

    return make


def _muon(setting: TrialContext, numbers: Numbers) -> Optimizer:
    hidden = hidden_weights(setting.model, setting.example)
    known = {id(p) for p in hidden}
    return MuonAdamW(hidden, [p for p in learning(setting.model) if id(p) not in known], **numbers)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


_PACKAGE = "pytorch_optimizer"

_PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("sgd", "SGD with Nesterov momentum 0.9", GRADIENT_SIZED, _plain(nesterov)),
        Peer("adamw", "AdamW", unit_sized(3e-3), _plain(torch.optim.AdamW)),
        Peer("muon", "torch's Muon for hidden weights, AdamW for the rest", unit_sized(5e-3), _muon),
        Peer("soap", "SOAP: Adam in the eigenbases of Shampoo", unit_sized(5e-3), _plain(soap), _PACKAGE),
        Peer(
            "shampoo",
            "Shampoo, grafted onto SGD with Nesterov momentum",
            GRADIENT_SIZED,
            _plain(shampoo),
            _PACKAGE,
        ),
    )
}
