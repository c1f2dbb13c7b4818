"""What a plan makes: blocks and a learner, the same from the same seed."""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.seeded import seeded
from plywise.data.classes import ClassData, take_classes
from plywise.errors import PlywiseError
from plywise.local.blocks import Blocks
from plywise.local.chain import assemble, join, tensors_of
from plywise.local.learner import Learner
from plywise.local.settings import READERS, check_settings, learner_settings
from plywise.local.split import split
from plywise.local.trainer import MakeOptimizer, MakeRule
from plywise.local.units import units_of
from plywise.registry.resolve import (
    make_model,
    resolve_learner,
    resolve_optimizer,
    resolve_parts,
    resolve_rule,
)
from plywise.training.config import TrainConfig

WIDTH = 128  # of the default network
BLOCKS = 4  # unless the plan says how many


def make_data(plan: TrainConfig) -> ClassData:
    """The plan's data.

    Raises:
        PlywiseError: there are no such data, or they are none for classification.
    """
    return take_classes(plan.data, resolve_parts(plan.data))


def make_blocks(
    plan: TrainConfig, x: Tensor, classes: int, starts: Sequence[int] = ()
) -> tuple[Blocks, tuple[int, ...]]:
    """The plan's network in blocks, and where it was cut.

    A model is cut by measured cost, which is another one each time. Whoever wants the same blocks again, in
    another process or to go on, says where the cuts were.

    Args:
        plan: the plan.
        x: all training inputs; the first batch is the example.
        classes: number of classes.
        starts: the first unit of each block, as returned before; empty for the plan's, or else to measure.

    Returns:
        The blocks, and the first unit of each; empty where there was nothing to cut.

    Raises:
        PlywiseError: the factory does not make a network, or that does not come apart.
    """
    example = x[: plan.batch_size]
    with seeded(plan.seed):
        if plan.model is None:
            return Blocks(_default_network(plan, x[0].numel(), classes), example), ()
        made = make_model(plan.model)
        if isinstance(made, nn.Module) and not isinstance(made, nn.ModuleList):
            starts = starts or plan.split or ()
            return _cut(made, len(starts) or plan.blocks or BLOCKS, example, starts)
    modules = list(made) if isinstance(made, nn.ModuleList | list | tuple) else [made]
    if wrong := [type(module).__name__ for module in modules if not isinstance(module, nn.Module)]:
        raise PlywiseError(
            f"{plan.model} must make an nn.Module, or a list of them, one a block; it made a "
            f"{type(made).__name__}" + ("." if modules == [made] else f" with a {wrong[0]} in it."),
            see="error-address",
        )
    if plan.split is not None:
        raise PlywiseError(
            f"split says where a model is cut, and {plan.model} makes blocks.", see="error-command"
        )
    if plan.blocks not in (None, len(modules)):
        raise PlywiseError(
            f"{plan.model} makes {len(modules)} blocks, and blocks is {plan.blocks}.", see="error-command"
        )
    return Blocks(modules, example), ()


def make_learner(plan: TrainConfig, blocks: Blocks, classes: int) -> Learner:
    """The plan's learner.

    Raises:
        PlywiseError: there is no such learner, optimizer or rule, or its settings are refused.
    """
    learner: Any = resolve_learner(plan.learner)
    settings = learner_settings(learner, plan.set)
    if "num_classes" in inspect.signature(learner).parameters:
        settings["num_classes"] = classes
    training = {"optimizer": _optimizer(plan), "rule": _rule(plan), "seed": plan.seed}
    with seeded(plan.seed):
        try:
            made: Learner = learner(blocks, **settings, **training)
        except (ValueError, TypeError) as error:
            raise PlywiseError(str(error), see="error-command") from error
    return made


def _default_network(plan: TrainConfig, features: int, classes: int) -> list[nn.Module]:
    """One linear layer a block; the last one makes the prediction, where the learner takes it from there."""
    widths = [features] + [WIDTH] * (plan.blocks or BLOCKS)
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    if resolve_learner(plan.learner).__name__ not in READERS:
        blocks[-1] = nn.Linear(widths[-2], classes)
    blocks[0] = nn.Sequential(nn.Flatten(), blocks[0])
    return blocks


def _cut(model: nn.Module, k: int, example: Tensor, starts: Sequence[int]) -> tuple[Blocks, tuple[int, ...]]:
    if k == 1 or not starts:  # one block is the whole model, whatever it is made of
        blocks = split(model, k, example)
        return blocks, () if k == 1 else _starts(model, blocks, example)
    Blocks([model], example.clone())  # materialises lazy layers, as split does
    units, _ = units_of(model, example)
    if list(starts) != sorted(set(starts)) or starts[0] != 0 or starts[-1] >= len(units):
        raise PlywiseError(
            f"{type(model).__name__} has {len(units)} units, numbered from 0, and is not to be cut at "
            f"{', '.join(map(str, starts))}. Has its code changed?",
            see="error-command",
        )
    parts = [join(units[start:stop]) for start, stop in pairwise([*starts, len(units)])]
    return Blocks([assemble(model, part) for part in parts], example.clone()), tuple(starts)


def _starts(model: nn.Module, blocks: Blocks, example: Tensor) -> tuple[int, ...]:
    """The first unit of each block: every unit has a parameter, under the name that it has in the model."""
    unit_of: dict[str, int] = {}
    for number, unit in enumerate(units_of(model, example)[0]):
        unit_of |= dict.fromkeys((name for name, _ in tensors_of(model, unit.nodes)), number)
    return tuple(min(unit_of[name] for name, _ in block.named_parameters()) for block in blocks)


def _optimizer(plan: TrainConfig) -> MakeOptimizer:
    make: Callable[..., Optimizer] = resolve_optimizer(plan.optimizer)
    settings = [name for name in inspect.signature(make).parameters if name not in ("params", "lr")]
    check_settings(make.__name__, plan.optimizer_set, settings)
    return lambda groups: make(groups, lr=plan.rate, **plan.optimizer_set)


def _rule(plan: TrainConfig) -> MakeRule | None:
    if plan.rule is None:
        return None
    rule: Any = resolve_rule(plan.rule)
    check_settings(rule.__name__, plan.rule_set, inspect.signature(rule).parameters)
    return lambda: rule(**plan.rule_set)
