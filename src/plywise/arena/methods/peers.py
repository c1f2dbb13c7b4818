"""The established optimizers that everything is compared with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.adamw import make_adamw
from plywise._util.extras import import_extra
from plywise.arena.method import (
    EndToEnd,
    Method,
    Numbers,
    Trainer,
    TrialContext,
    end_to_end,
    with_rule,
    wrap_class,
)
from plywise.arena.methods import NULL_CONTROL, PEERS
from plywise.arena.space import Range, Space
from plywise.engine.rule import Rule
from plywise.optim import KLSOAP, SOAP, Muon, NorMuon
from plywise.optim.hidden_weights import find_hidden_weights, group_for_muon
from plywise.registry.resolve import resolve_optimizer

GRADIENT_SIZED: Space = {"lr": Range(1e-3, 1.0, 0.07), "weight_decay": Range(1e-6, 1e-2, 1e-4)}
"""The weight decay of optimizers with steps proportional to the gradient: it is added to the gradient."""


def unit_sized(rate: float, weight_decay: float = 1e-2, high: float = 1e-1) -> Space:
    """Return the space of optimizers whose steps do not scale with the gradient; the decay is decoupled.

    Rates are searched over three decades up to ``high``.
    """
    return {"lr": Range(high / 1000, high, rate), "weight_decay": Range(1e-4, 1.0, weight_decay)}


@dataclass(frozen=True)
class Peer:
    """An optimizer, and what may be tuned about it.

    Attributes:
        name: the method's name.
        about: one line.
        space: its tuned numbers; its rate is ``lr``.
        make: makes it from a setting and its numbers.
        needs: a package that it comes from and plywise does not bring, or nothing.
        train: how it trains, from a setting, the optimizer and perhaps a rule.
    """

    name: str
    about: str
    space: Space
    make: Callable[[TrialContext, Numbers], Optimizer]
    needs: str = ""
    train: Callable[[TrialContext, Optimizer, Rule | None], Trainer] = end_to_end


# ---- the optimizers --------------------------------------------------------------------------------


def nesterov(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> Optimizer:
    """SGD with Nesterov momentum 0.9."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


class TorchMuon(Optimizer):
    """torch's own Muon for matrices and AdamW for all else, stepped and scheduled as one optimizer.

    Args:
        hidden: weights that Muon is made for. torch's takes matrices only: the others move by AdamW.
        rest: all other parameters.
        numbers: rate and decay of both: their steps are of one size.
    """

    def __init__(self, hidden: list[nn.Parameter], rest: list[nn.Parameter], **numbers: Any) -> None:
        matrices = [weight for weight in hidden if weight.dim() == 2]
        others = [*(weight for weight in hidden if weight.dim() != 2), *rest]
        super().__init__([*matrices, *others], dict(numbers))
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **numbers))
        if others:
            self.parts.append(make_adamw(others, **numbers))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of both; closures are not for them."""
        for part in self.parts:
            part.step()


def shampoo(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, every: int = 25
) -> Optimizer:
    """Shampoo grafted onto SGD, its roots from every 25th step (its default, 1000, is more than a run)."""
    return _import_package("shampoo").ScalableShampoo(
        parameters,
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        start_preconditioning_step=every,
        preconditioning_compute_steps=every,
    )


def schedule_free(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, warmup_steps: int = 0
) -> Optimizer:
    """Schedule-free AdamW: its rate stays, and what is evaluated is a mean of the iterates."""
    return _import_package("schedule-free").ScheduleFreeAdamW(
        parameters, lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps
    )


class Averaged(EndToEnd):
    """Training that predicts with the mean of the iterates, which the optimizer keeps."""

    def predict(self, x: Tensor) -> Tensor:
        """Return the averaged network's outputs in eval mode; training goes on from where it was."""
        optimizer: Any = self.optimizer
        optimizer.eval()
        try:
            return super().predict(x)
        finally:
            optimizer.train()


def averaged(setting: TrialContext, optimizer: Optimizer, rule: Rule | None = None) -> EndToEnd:
    """Train with a schedule-free optimizer, without the cosine, and perhaps a rule."""
    made = with_rule(setting.model, optimizer, rule, setting.task.loss)
    return Averaged(made.model, made.optimizer, made.loss)


def _import_package(method: str) -> Any:
    need = f"Method {method} needs the package pytorch_optimizer: pip install 'plywise[bench]'."
    return import_extra("pytorch_optimizer", need)


# ---- as methods ------------------------------------------------------------------------------------


def find_peer(name: str) -> Peer:
    """Return the peer called ``name``, or of the optimizer's class at the address ``name``.

    Raises:
        PlywiseError: there is nothing at the address, or no optimizer.
    """
    if name in PEERS:
        return _PEERS[name]
    optimizer = resolve_optimizer(name)
    method = wrap_class(name, optimizer)
    return Peer(name, method.about, method.space, _treat_alike(optimizer))


def wrap_peer(name: str) -> Method:
    """Return a peer, or the null control, as a method."""
    if name == NULL_CONTROL:
        about = "SGD a second time: the null control"
        return replace(wrap_peer(PEERS[0]), name=name, about=about, baseline=False, null=PEERS[0])
    peer = _PEERS[name]

    def make(setting: TrialContext) -> Trainer:
        return peer.train(setting, peer.make(setting, setting.numbers), None)

    return Method(name, peer.about, peer.space, make, baseline=True, needs=peer.needs)


def _treat_alike(optimizer: Callable[..., Optimizer]) -> Callable[[TrialContext, Numbers], Optimizer]:
    """Return an optimizer that treats all parameters alike."""

    def make(setting: TrialContext, numbers: Numbers) -> Optimizer:
        return optimizer(list_trained(setting.model), **numbers)

    return make


def _make_muon(setting: TrialContext, numbers: Numbers) -> Optimizer:
    settings: dict[str, Any] = dict(numbers)
    return Muon(group_hidden(setting), adjust_lr_fn="match_rms_adamw", **settings)


def _make_torch_muon(setting: TrialContext, numbers: Numbers) -> Optimizer:
    hidden = hidden_weights(setting)
    known = {id(weight) for weight in hidden}
    return TorchMuon(hidden, [p for p in list_trained(setting.model) if id(p) not in known], **numbers)


def _make_normuon(setting: TrialContext, numbers: Numbers) -> Optimizer:
    settings: dict[str, Any] = dict(numbers)
    return NorMuon(group_hidden(setting), **settings)


def group_hidden(setting: TrialContext) -> list[dict[str, Any]]:
    """Hidden weights for Muon, the rest for AdamW at the same rate: steps of both are of one size."""
    return group_for_muon(setting.model, hidden_weights(setting))


def hidden_weights(setting: TrialContext) -> list[nn.Parameter]:
    """Return the weights of a trial's model that Muon is made for."""
    return find_hidden_weights(setting.model, lambda: setting.model(setting.example))


def _schedule_free(setting: TrialContext, numbers: Numbers) -> Optimizer:
    return schedule_free(list_trained(setting.model), warmup_steps=setting.steps // WARMUP, **numbers)


def list_trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


_PACKAGE = "pytorch_optimizer"
WARMUP = 20
"""Schedule-free AdamW's rate rises in the first of so many parts of a run."""

_PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("sgd", "SGD with Nesterov momentum 0.9", GRADIENT_SIZED, _treat_alike(nesterov)),
        Peer("adamw", "AdamW, fused", unit_sized(1e-2), _treat_alike(make_adamw)),
        Peer("muon", "Muon for hidden weights, AdamW for the rest", unit_sized(2e-2, 0.1, 0.2), _make_muon),
        Peer(
            "torch-muon",
            "torch.optim.Muon for hidden matrices, AdamW for the rest and for convolutions",
            unit_sized(2e-2, 0.1, 0.2),
            _make_torch_muon,
        ),
        Peer(
            "normuon",
            "NorMuon for hidden weights, AdamW for the rest",
            unit_sized(2e-2, 0.1, 0.2),
            _make_normuon,
        ),
        Peer(
            "soap", "SOAP: Adam in the eigenbases of Shampoo", unit_sized(2e-2, 0.1, 0.2), _treat_alike(SOAP)
        ),
        Peer(
            "kl-soap",
            "SOAP with statistics by the KL divergence",
            unit_sized(1e-2, 0.1, 0.2),
            _treat_alike(KLSOAP),
        ),
        Peer(
            "schedule-free",
            "schedule-free AdamW, warmed up in a twentieth of the steps",
            unit_sized(5e-3),
            _schedule_free,
            _PACKAGE,
            averaged,
        ),
        Peer(
            "shampoo",
            "Shampoo, grafted onto SGD with Nesterov momentum",
            GRADIENT_SIZED,
            _treat_alike(shampoo),
            _PACKAGE,
        ),
    )
}
