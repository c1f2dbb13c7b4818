"""plywise's local learners as methods."""

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from plywise._util.modes import evaluating
from plywise.arena.method import Method, TrialContext, make_cosine
from plywise.arena.methods import LEARNER_OF, RULE_OF
from plywise.arena.methods.peers import unit_sized
from plywise.arena.methods.rules import list_tuned
from plywise.arena.space import MOST_TUNED, Range, Space, get_defaults
from plywise.arena.workload import Workload
from plywise.data.batches import TARGETS, Batch, clone_batch
from plywise.data.models import call_model, unwrap_model
from plywise.engine.health import SKIPPED
from plywise.engine.rule import Rule
from plywise.errors import BenchError, NonFiniteError
from plywise.local.associated_maps import mean_decoder, pooled_bridge
from plywise.local.blocks import Blocks
from plywise.local.cutting.units import find_units, join_units
from plywise.local.learner import Learner
from plywise.local.linear_heads import RidgeHead
from plywise.local.settings import READERS
from plywise.local.split import balance, split
from plywise.registry.find import find_learner
from plywise.registry.resolve import resolve_rule

ADAMW = unit_sized(3e-3)
"""What is tuned for a learner without hyper-parameters: rate and decay of AdamW."""

RELAXATION = {"rate": 0.5, "iterations": 30}
"""Activations are then within 1 % of backpropagation's gradients in four blocks."""

MOST_FEATURES = 2048
"""Positions are averaged where a block hands on more: a ridge head's cost is their square."""


@dataclass
class LocalTraining:
    """A local learner in the arena.

    Attributes:
        learner: the learner.
        plain: whether its predictions are what the task's loss takes.
    """

    learner: Learner
    plain: bool

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; the mean of the components' losses before the step.

        Raises:
            NonFiniteError: a component was given a gradient that is not finite. Its optimizer did not step,
                but end-to-end training has no such net.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The gradient of", RuntimeWarning)  # raised just below
            losses = self.learner.step(x, y)
        if any(trainer.health.total(SKIPPED) for trainer in self.learner.trainers):
            raise NonFiniteError("A component's gradient is not finite.")
        return losses.mean().item()

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's outputs in eval mode."""
        return self.learner.predict(x)


@runtime_checkable
class TiedModel(Protocol):
    """A language model whose head shares the weight of its embedding, so that it cannot be cut directly.

    Local learners can also train a user's model that has these three.
    """

    @property
    def table(self) -> nn.Embedding:
        """The embedding."""
        ...

    def trunk(self) -> nn.Module:
        """Return all before the last norm and the head, with the model's own layers."""
        ...

    def untied(self) -> nn.Module:
        """Return the whole model with a copy of the weight in its head."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a learner competes.

    Attributes:
        space: the numbers that may be tuned.
        settings: the learner's arguments, from the tuned numbers.
        loss: whether it takes the task's loss.
        tokens: whether it can learn a class for each token.
    """

    space: Space = field(default_factory=lambda: ADAMW)
    settings: Callable[[TrialContext], dict[str, Any]] = lambda _: {}
    loss: bool = False
    tokens: bool = False


def _tie_readouts(setting: TrialContext) -> dict[str, Any]:
    """Tie the readouts of the blocks to the embedding if the model's output is tied to it."""
    return {"tied": setting.model.table} if isinstance(setting.model, TiedModel) else {}


def _choose_codes(setting: TrialContext) -> dict[str, Any]:
    return {"code": round(setting.numbers["code"]), "bridge": pooled_bridge, "decoder": mean_decoder}


def _make_ridge(setting: TrialContext) -> dict[str, Any]:
    ridge = setting.numbers["ridge"]

    def head(shape: torch.Size, classes: int) -> RidgeHead:
        most = MOST_FEATURES if len(shape) > 1 else max(MOST_FEATURES, shape.numel())
        return RidgeHead(shape, classes, ridge=ridge, max_features=most)

    return {"head": head}


def _make_threshold(setting: TrialContext) -> dict[str, Any]:
    return {"threshold": setting.numbers["threshold"], "skip": 0}  # the last block may be the classifier


RECIPES = {
    "AssociatedLearning": Recipe(
        {"lr": Range(1e-4, 1e-1, 7.5e-3), "code": Range(16, 256, 40)}, _choose_codes
    ),
    "LocalLoss": Recipe(loss=True, tokens=True),
    "LocalNextToken": Recipe(settings=_tie_readouts, tokens=True),
    "Interlocking": Recipe(loss=True, tokens=True),
    "CascadedForward": Recipe({"ridge": Range(1e-5, 1.0, 1e-2)}, _make_ridge),
    "LocalForwardGradient": Recipe(),
    "ForwardForward": Recipe(
        {"lr": Range(1e-4, 1e-1, 1e-2), "threshold": Range(0.3, 10.0, 1.0)}, _make_threshold
    ),
    "MonoForward": Recipe(),
    "DirectFeedback": Recipe(loss=True),
    "MomentumAuxiliary": Recipe(loss=True),
    "SCPL": Recipe(),
    "ActivationRelaxation": Recipe(settings=lambda _: RELAXATION, loss=True),
}
"""By the learners' names."""


def wrap_learner(name: str, rule: str | None = None) -> Method:
    """A local learner as a method: AdamW for every component, its rate on the cosine that all methods get.

    The learner's blocks are the model's, cut into pieces of about equal work. Random numbers follow from the
    trial's seed.

    Args:
        name: a key of ``LEARNER_OF``.
        rule: a key of ``RULE_OF``, or the address of a rule's class: it acts inside every component. None for
            plain gradients.

    Raises:
        PlywiseError: a rule is asked for, and the learner has no gradients for it.

    Example:
        >>> wrap_learner("cascaded-forward").space
        {'ridge': Range(low=1e-05, high=1.0, default=0.01, log=True)}
        >>> list(wrap_learner("local-loss", "foof").space)
        ['lr', 'damping']
    """
    learner = find_learner(LEARNER_OF[name])
    recipe = RECIPES[learner.__name__]
    about = f"{(learner.__doc__ or '').split('.')[0]}, on AdamW."
    if rule is not None:
        if "lr" not in recipe.space:
            raise BenchError(f"Method {name} learns in closed form: there is no gradient for {rule}.")
        about = f"{about[:-1]} with {RULE_OF.get(rule, rule)} inside."
        name, recipe = f"{name}+{rule}", _add_rule(recipe, resolve_rule(RULE_OF.get(rule, rule)))
    make = partial(begin, name, learner, recipe)
    refuses = partial(uncut, tokens=recipe.tokens)
    return Method(name, about, recipe.space, make, count=partial(passes, make), refuses=refuses, local=True)


def uncut(workload: Workload, tokens: bool = False) -> str:
    """Return why local learners cannot run on a workload; "" if they can.

    Args:
        workload: the workload.
        tokens: whether the learner can learn a class for each token.
    """
    if not workload.classes:
        return "a local learner needs classes, and the targets are none"
    if workload.labels_tokens and not tokens:
        return "it learns a class for each sample, and here each token has one"
    return "" if workload.blocks else "a local learner needs a network that can be cut into blocks"


def passes(make: Callable[[TrialContext], LocalTraining], setting: TrialContext) -> float:
    """Count the products in a learner's step, in forward and backward passes of the plain model.

    Heads, bridges and codes are counted; solving a ridge head's system is not, for it is not a product.
    """
    x, plain = setting.example, copy.deepcopy(setting.model)
    with FlopCounterMode(display=False) as once:
        scores = plain(x)
        places = scores.shape[:-1]  # samples, or tokens of samples
        y = torch.arange(places.numel(), device=scores.device).view(places) % setting.classes
        setting.task.loss(scores, y).backward()
    learner = make(setting)
    with FlopCounterMode(display=False) as local:
        learner.step(x, y)
    return round(local.get_total_flops() / once.get_total_flops(), 2)


def _add_rule(recipe: Recipe, rule: type[Rule]) -> Recipe:
    tuned, untuned = list_tuned(rule), get_defaults(recipe.space)

    def settings(setting: TrialContext) -> dict[str, Any]:
        own = {key: value for key, value in setting.numbers.items() if key in tuned.numbers}
        whole = replace(setting, numbers={**untuned, **setting.numbers})
        return {**recipe.settings(whole), "rule": lambda: rule(**tuned.fixed, **own)}

    rate, *others = recipe.space.items()
    space = dict(islice(chain([rate], tuned.numbers.items(), others), MOST_TUNED))
    return replace(recipe, space=space, settings=settings)


def begin(name: str, learner: Callable[..., Learner], recipe: Recipe, setting: TrialContext) -> LocalTraining:
    """Return a learner at work on a model.

    Raises:
        PlywiseError: the workload's model is not to be cut, or it has no classes and the learner needs them.
        BlockError: the model cannot be cut.
    """
    if setting.blocks == 0:
        raise BenchError(
            f"Method {name} trains a model block by block, and this workload says that its model is not to "
            "be cut (blocks=0)."
        )
    settings = recipe.settings(setting)
    if "num_classes" in inspect.signature(learner).parameters:
        if setting.classes == 0:
            raise BenchError(
                f"Method {name} has every block learn to tell classes apart, and this workload has none "
                "(classes=0)."
            )
        settings = {"num_classes": setting.classes, **settings}
    if recipe.loss:
        settings = {"loss": setting.task.loss, **settings}
    adamw: dict[str, Any] = get_defaults(ADAMW)
    adamw |= {key: value for key, value in setting.numbers.items() if key in ADAMW}
    model = setting.model
    if isinstance(model, TiedModel):
        model = model.trunk() if "tied" in settings else model.untied()
    made = learner(
        cut(model, setting.blocks, setting.example),
        optimizer=lambda groups: AdamW(groups, **adamw),
        scheduler=make_cosine(setting.steps),
        seed=int(torch.randint(2**31, ())),
        **settings,
    )
    return LocalTraining(made, plain=type(made).__name__ not in READERS)


def cut(model: nn.Module, k: int, example: Batch) -> Blocks:
    """Cut a model as `plywise.split` does, but by counted work, which gives the same cuts every time.

    Raises:
        BlockError: see `plywise.split`.
    """
    model = unwrap_model(model)
    with torch.no_grad(), evaluating(model):
        call_model(model, clone_batch(example), TARGETS)  # materialises lazy layers
    units = find_units(model, example)[0] if k > 1 else []
    if len(units) < k:
        return split(model, k, example)  # one block, or its error, which says why there are not more units
    whole = Blocks([unit.assemble(model) for unit in units], clone_batch(example))
    work, signal = [], whole.begin(example, torch.empty(0))
    with torch.no_grad(), evaluating(model):
        for block in whole:
            with FlopCounterMode(display=False) as counter:
                signal = replace(signal, s=replace(signal, s=signal.s.clone()).through(block))
            work.append(1 + counter.get_total_flops())
    blocks = join_units(units, [part.start for part in balance(work, k)])
    return Blocks([unit.assemble(model) for unit in blocks], clone_batch(example))
