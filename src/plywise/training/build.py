"""Builds a learner from a configuration, whose names are resolved once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.seeded import seeded
from plywise.data.batches import Batch, clone_batch
from plywise.data.models import StepModel
from plywise.data.reading import ReadOptions
from plywise.data.sources import Reading
from plywise.data.training_data import CLASSES, LOSSES, TrainingData, take_training_data
from plywise.errors import AddressError, BlockError, CommandError, DataError
from plywise.local.blocks import Blocks
from plywise.local.cutting.units import find_units, join_units
from plywise.local.learner import Learner
from plywise.local.settings import READERS, check_settings, learner_settings
from plywise.local.split import split
from plywise.local.trainer import MakeOptimizer, MakeRule
from plywise.local.whole_model import WholeModel
from plywise.registry.resolve import (
    make_model,
    resolve_function,
    resolve_learner,
    resolve_optimizer,
    resolve_parts,
    resolve_rule,
)
from plywise.training.config import BLOCKS, TrainConfig

ANY_LOSS = ("LocalLoss", "Interlocking", "ActivationRelaxation")
"""Learners whose blocks all follow the loss that fits the targets."""
WIDTH = 128  # of the default network


@dataclass(frozen=True)
class ResolvedTraining:
    """A `TrainConfig` with its names looked up and its data read and checked, once for all.

    Attributes:
        config: the configuration.
        data: the data.
        learner: the learner's class.
        settings: its hyper-parameters; addresses of functions are loaded.
        optimizer: makes a component's optimizer of its parameters.
        rule: makes a component's rule; None for plain gradients.
    """

    config: TrainConfig
    data: TrainingData
    learner: type[Learner]
    settings: Mapping[str, Any]
    optimizer: MakeOptimizer
    rule: MakeRule | None

    def make_blocks(self, starts: Sequence[int] = ()) -> tuple[Blocks, tuple[int, ...]]:
        """Return the network in blocks, and where it was cut.

        A model is cut by measured cost, which differs each time. To get the same blocks again, in another
        process or after a resume, pass the earlier cuts.

        Args:
            starts: the first unit of each block, as returned before; empty for those of the configuration, or
                else to measure.

        Returns:
            The blocks, and the first unit of each; empty where there was nothing to cut.

        Raises:
            PlywiseError: the factory does not make a network, or that cannot be cut.
        """
        config, example = self.config, self.example
        with seeded(config.seed):
            if config.model is None:
                return Blocks(self._default_network(example[0].numel()), example), ()
            made = make_model(config.model)
            try:
                if isinstance(made, nn.Module) and not isinstance(made, nn.ModuleList):
                    starts = starts or config.split or ()
                    blocks = len(starts) or config.blocks or _count_blocks(made, example)
                    return _cut_model(made, blocks, example, starts)
                return Blocks(_list_blocks(config, made), example), ()
            except BlockError as error:
                if error.__cause__ is not None and config.data == TrainConfig.data:  # the forward raised
                    error.add_note(f"The data are the {config.data} of plywise; --data names others.")
                raise

    @property
    def example(self) -> Batch:
        """A batch of inputs."""
        return next(iter(self.data.train.chunks(self.config.batch_size)))[0]

    def make_whole(self) -> Learner:
        """Return the learner of a whole model and a step function.

        Raises:
            PlywiseError: one of them cannot be had, or the optimizer's or the rule's settings are refused.
        """
        config = self.config
        with seeded(config.seed):
            network = make_model(str(config.model))
            metric = resolve_function(config.metric, "your metric") if config.metric else None
            model = StepModel(network, resolve_function(str(config.step), "your step"), metric)
            try:
                return WholeModel(model, optimizer=self.optimizer, rule=self.rule, seed=config.seed)
            except (ValueError, TypeError) as error:
                raise CommandError(str(error)) from error

    def make_learner(self, blocks: Blocks) -> Learner:
        """Return the learner of some blocks.

        Raises:
            PlywiseError: its settings, the optimizer's or the rule's are refused.
        """
        learner: Any = self.learner
        settings = dict(self.settings)
        known = inspect.signature(learner).parameters
        if "num_classes" in known:
            settings["num_classes"] = self.data.outputs
        if self.data.kind != CLASSES:
            is_ours = learner.__module__.startswith("plywise.")
            if "loss" not in known or (is_ours and learner.__name__ not in ANY_LOSS):
                raise DataError(
                    f"{self.config.learner} learns classes, one a sample, and the targets are "
                    f"{self.data.kind}: take {', '.join(ANY_LOSS[:-1])} or {ANY_LOSS[-1]}."
                )
            settings.setdefault("loss", LOSSES[self.data.kind])
        training = {"optimizer": self.optimizer, "rule": self.rule, "seed": self.config.seed}
        with seeded(self.config.seed):
            try:
                made: Learner = learner(blocks, **settings, **training)
            except (ValueError, TypeError) as error:
                raise CommandError(str(error)) from error
        return made

    def _default_network(self, features: int) -> list[nn.Module]:
        """Make the default network: a linear layer for each block. The last one predicts, or the learner."""
        widths = [features] + [WIDTH] * (self.config.blocks or BLOCKS)
        blocks: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        if self.learner.__name__ not in READERS:
            blocks[-1] = nn.Linear(widths[-2], self.data.outputs)
        blocks[0] = nn.Sequential(nn.Flatten(), blocks[0])
        return blocks


def resolve_training(config: TrainConfig, folder: Path | None = None) -> ResolvedTraining:
    """Find and read what a configuration names.

    Args:
        config: the configuration.
        folder: where the batches of a stream are kept. Default: the folder for temporary files.

    Raises:
        PlywiseError: there are no such data, they are none for classification, or there is no such learner,
            optimizer, rule or hyper-parameter.
    """
    learner = resolve_learner(config.learner)
    return ResolvedTraining(
        config,
        _resolve_data(config, folder),
        learner,
        learner_settings(learner, config.set),
        _resolve_optimizer(config),
        _resolve_rule(config),
    )


def _resolve_data(config: TrainConfig, folder: Path | None) -> TrainingData:
    is_whole = config.step is not None
    options = ReadOptions.parse(config.read)
    reading = Reading(options, is_whole, config.batch_size, config.keep_batches, folder)
    parts = resolve_parts(config.data, reading)
    return take_training_data(config.data, parts, is_whole)


def _list_blocks(config: TrainConfig, made: Any) -> list[nn.Module]:
    modules = list(made) if isinstance(made, nn.ModuleList | list | tuple) else [made]
    if wrong := [type(module).__name__ for module in modules if not isinstance(module, nn.Module)]:
        raise AddressError(
            f"{config.model} must make an nn.Module, or a list of them, one a block; it made a "
            f"{type(made).__name__}" + ("." if modules == [made] else f" with a {wrong[0]} in it.")
        )
    if config.split is not None:
        raise CommandError(f"split says where a model is cut, and {config.model} makes blocks.")
    if config.blocks not in (None, len(modules)):
        raise CommandError(f"{config.model} makes {len(modules)} blocks, and blocks is {config.blocks}.")
    return modules


def _count_blocks(model: nn.Module, example: Batch) -> int:
    """Return the default number of blocks: 4, or as many as the model can be cut into."""
    if isinstance(example, Tensor):
        Blocks([model], example.clone())  # materialises lazy layers, as split does
    try:
        return max(1, min(BLOCKS, len(find_units(model, example)[0])))
    except BlockError as error:
        error.add_note(f"{BLOCKS} blocks are the default; --blocks 1 trains the model as a whole.")
        raise


def _cut_model(
    model: nn.Module, k: int, example: Batch, starts: Sequence[int]
) -> tuple[Blocks, tuple[int, ...]]:
    if k == 1 or not starts:  # one block is the whole model, whatever it is made of
        blocks = split(model, k, example)
        return blocks, () if k == 1 else _starts(model, blocks, example)
    if isinstance(example, Tensor):
        Blocks([model], example.clone())  # materialises lazy layers, as split does
    units, _ = find_units(model, example)
    if list(starts) != sorted(set(starts)) or starts[0] != 0 or starts[-1] >= len(units):
        raise CommandError(
            f"{type(model).__name__} has {len(units)} units, numbered from 0, and is not to be cut at "
            f"{', '.join(map(str, starts))}. Has its code changed?"
        )
    modules = [unit.assemble(model) for unit in join_units(units, starts)]
    return Blocks(modules, clone_batch(example)), tuple(starts)


def _starts(model: nn.Module, blocks: Blocks, example: Batch) -> tuple[int, ...]:
    """The first unit of each block: every unit has a parameter, under the name that it has in the model."""
    unit_of: dict[str, int] = {}
    for number, unit in enumerate(find_units(model, example)[0]):
        unit_of |= dict.fromkeys(unit.name_parameters(model), number)
    return tuple(min(unit_of[name] for name, _ in block.named_parameters()) for block in blocks)


def _resolve_optimizer(config: TrainConfig) -> MakeOptimizer:
    make: Callable[..., Optimizer] = resolve_optimizer(config.optimizer)
    settings = [name for name in inspect.signature(make).parameters if name not in ("params", "lr")]
    check_settings(make.__name__, config.optimizer_set, settings)
    return lambda groups: make(groups, lr=config.rate, **config.optimizer_set)


def _resolve_rule(config: TrainConfig) -> MakeRule | None:
    if config.rule is None:
        return None
    rule: Any = resolve_rule(config.rule)
    check_settings(rule.__name__, config.rule_set, inspect.signature(rule).parameters)
    return lambda: rule(**config.rule_set)
