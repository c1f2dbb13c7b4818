"""The configuration of a training, from a TOML file, from flags, or from a run's folder."""

import ast
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.suggest import suggestion
from plywise.errors import CommandError

HOW = ("epochs", "threads", "out", "every", "keep", "tensorboard", "replicas", "cuts")
"""Fields that may change when a run is resumed; the others decide what is trained."""

_LEAST = {
    **{"blocks": 1, "batch_size": 1, "seed": 0, "epochs": 1},
    **{"threads": 1, "every": 1, "keep": 1, "replicas": 1, "keep_batches": 1},
}
_TEXTS = ("model", "data", "step", "metric", "learner", "optimizer", "rule")
_SETTINGS = ("set", "optimizer_set", "rule_set")


BLOCKS = 4
"""Blocks that a model is cut into, unless the configuration says how many, or the model has fewer."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training. The fields are the flags of `plywise train` and `plywise pipeline`.

    Attributes:
        model: function that makes your network, as module:name: an nn.Module, which is cut into blocks of
            equal cost, or a list of blocks. Default: a linear layer of 128 and ReLU for each block.
        data: digits (they come with plywise), or what `plywise bench` takes: module:name of a function that
            returns (x, y), (x, y, x_test, y_test) or three pairs, where a Dataset, a DataLoader or an
            iterable of batches may stand for a pair; a .npz file with x_train, y_train and perhaps x_test,
            y_test; a .csv or .parquet file whose last column is the target; a folder of images. Default
            digits.
        read: how the data are read, where plywise would guess: header=yes or no and target=NAME (a column)
            for a .csv file, targets=classes or numbers, inputs=numbers, images or tokens; put commas between.
        keep_batches: batches that are kept of a stream (a DataLoader, an iterable). Default: 1000.
        step: function of your model and a batch of your data to the loss, as module:name: the model trains as
            a whole by it, without a learner.
        metric: with --step, function of your model and a batch to a number, the lower the better, as
            module:name: what the test data are judged by. Default: the loss.
        learner: AssociatedLearning, SCPL, LocalLoss, LocalNextToken, Interlocking, CascadedForward,
            LocalForwardGradient, ForwardForward, MonoForward, DirectFeedback, MomentumAuxiliary or
            ActivationRelaxation, or module:name of a class of yours. Default LocalLoss.
        set: a hyper-parameter of the learner, as name=value; may be repeated.
        blocks: number of blocks. Default 4, or as many as a smaller model can be cut into.
        split: where the model is cut, as in 0,2,5: the first unit of each block. Default: by cost as measured
            when the run begins, so that two runs may be cut differently; the first lines say where.
        optimizer: a class of torch.optim, or module:name of one; each block gets its own. Default Adam.
        optimizer_set: an argument of the optimizer, as name=value; may be repeated.
        rate: learning rate. Default 0.003.
        rule: a rule inside each block (see `plywise methods`), or module:name of a class of yours. Default
            none: plain gradients.
        rule_set: a hyper-parameter of the rule, as name=value; may be repeated.
        batch_size: samples a batch; the last one of an epoch may have fewer. Default 64.
        seed: of weights, order of the samples, dropout. Default 0.
        epochs: passes over the training data; a finished run goes on with more of them. Default 10.
        threads: threads of each process. Rounding depends on it. Default 1.
        out: folder of checkpoints and logs. Default runs/train.
        every: steps between checkpoints. Default 500.
        keep: how many checkpoints stay, the newest. Default 3.
        tensorboard: log for TensorBoard, too.
        replicas: in a pipeline, processes that share each stage's batches.
        cuts: in a pipeline, the first component of each stage; None for balanced ones.

    Raises:
        PlywiseError: a value is out of range; the message has the flag's name.

    Example:
        >>> TrainConfig(epochs=0)
        Traceback (most recent call last):
        plywise.errors.CommandError: epochs must be a whole number of at least 1, not 0.
        More: plywise help command-error
    """

    model: str | None = None
    data: str = "digits"
    read: str = ""
    keep_batches: int | None = None
    step: str | None = None
    metric: str | None = None
    learner: str = "LocalLoss"
    set: Mapping[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    split: tuple[int, ...] | None = None
    optimizer: str = "Adam"
    optimizer_set: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 3e-3
    rule: str | None = None
    rule_set: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    seed: int = 0
    epochs: int = 10
    threads: int = 1
    out: Path = Path("runs/train")
    every: int = 500
    keep: int = 3
    tensorboard: bool = False
    replicas: int = 1
    cuts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_values()
        if self.split is not None and self.model is None:
            raise CommandError("split says where a model is cut, and there is no model.")
        if self.split is not None and self.blocks not in (None, len(self.split)):
            raise CommandError(f"split is of {len(self.split)} blocks, and blocks is {self.blocks}.")
        self._check_step()
        if self.rule is None and self.rule_set:
            raise CommandError(f"rule-set is given ({_word(self.rule_set)}), and no rule.")

    def _check_values(self) -> None:
        optional = [entry.name for entry in fields(self) if entry.default is None]
        for name, value in vars(self).items():
            if value is None and name in optional:
                continue
            if name in _LEAST and (type(value) is not int or value < _LEAST[name]):
                _refuse(name, f"a whole number of at least {_LEAST[name]}", value)
            if name in _TEXTS and not (isinstance(value, str) and value):
                _refuse(name, "a name", value)
        if type(self.rate) not in (int, float) or not 0 < self.rate < math.inf:
            _refuse("rate", "a number above 0", self.rate)
        if type(self.tensorboard) is not bool:
            _refuse("tensorboard", "true or false", self.tensorboard)

    def _check_step(self) -> None:
        if self.step is None:
            if self.metric is not None:
                raise CommandError("metric belongs to step, and no step is given.")
            return
        if self.model is None:
            raise CommandError("step says how a model trains, and there is no model.")
        if self.split is not None or self.blocks not in (None, 1) or self.set:
            raise CommandError("step trains the model as a whole: leave blocks, split and set out.")

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON, by the flags' names."""
        values: dict[str, Any] = json.loads(json.dumps(vars(self), default=str))
        return {_flag(name): value for name, value in values.items()}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """List the differences to another plan, as JSON, that matter, except data, read and split.

        Example:
            >>> TrainConfig(rate=0.01).differences(TrainConfig(epochs=20).as_json())
            ['rate is 0.003 there and 0.01 here']
        """
        mine = self.as_json()
        return [
            f"{flag} is {_word(other.get(flag))} there and {_word(value)} here"
            for flag, value in mine.items()
            if flag not in (*map(_flag, HOW), "data", "read", "split") and other.get(flag) != value
        ]


def read_config(file: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Read a plan from a TOML file and flags; flags have priority, and hyper-parameters of both are joined.

    Args:
        file: its keys are the flags' names; hyper-parameters are a table or a list of "name=value".
        flags: values by the names of the plan's fields; None where a flag is not given.

    Raises:
        PlywiseError: the file cannot be read, holds an unknown key, or a value is out of range.
    """
    given = {} if file is None else _from_toml(file)
    for name, value in flags.items():
        if value is not None:
            read = _convert_value(name, value)
            given[name] = {**given.get(name, {}), **read} if name in _SETTINGS else read
    return TrainConfig(**given)


def make_config(values: Mapping[str, Any], source: str) -> TrainConfig:
    """Return the plan of values by the flags' names.

    Raises:
        PlywiseError: a key is unknown, or a value is out of range; the message names the source.
    """
    return TrainConfig(**_name_fields(values, source))


def _from_toml(file: Path) -> dict[str, Any]:
    try:
        with require_file(file).open("rb") as opened:
            values = tomllib.load(opened)
    except FileNotFoundError as error:
        raise CommandError(f"{describe_failure(error)}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise CommandError(f"{file} is not TOML: {error}. Texts need quotation marks.") from error
    return _name_fields(values, str(file))


def _name_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values by the names of the plan's fields."""
    names = {_flag(entry.name): entry.name for entry in fields(TrainConfig)}
    for key in values:
        if key not in names:
            hint = suggestion(key, tuple(names)) or f"Known are: {', '.join(names)}."
            raise CommandError(f"{source} has a key {key!r}, which is unknown. {hint}".rstrip())
    return {names[key]: _convert_value(names[key], value) for key, value in values.items()}


def _convert_value(name: str, value: Any) -> Any:
    """Convert a value of a flag, of TOML or of JSON for the plan."""
    if name in _SETTINGS:
        return _settings(name, value)
    if name == "out":
        return Path(value) if isinstance(value, str | Path) and str(value) else _refuse(name, "a path", value)
    if name in ("cuts", "split") and value is not None:
        return _whole_numbers(name, value)
    return value


def _settings(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) or not isinstance(value, Iterable):
        _refuse(name, "a table, or a list of name=value", value)
    return parse_settings(_flag(name), f"--{_flag(name)} code=64", value)


def parse_settings(flag: str, example: str, words: Iterable[Any]) -> dict[str, Any]:
    """Values by name of words of the form name=value: Python literals, or the texts themselves.

    Raises:
        PlywiseError: a word has no "="; the message names the flag and the example.
    """
    read: dict[str, Any] = {}
    for word in words:
        key, equals, text = str(word).partition("=")
        if not equals:
            raise CommandError(f"{flag} needs name=value, as in {example}, not {word!r}.")
        try:
            read[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            read[key] = text
    return read


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    words = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(int(word) for word in words)
    except (TypeError, ValueError):
        return _refuse(name, "whole numbers, as in 0,2", value)


def _refuse(name: str, wanted: str, value: Any) -> Any:
    raise CommandError(f"{_flag(name)} must be {wanted}, not {value!r}.")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={setting!r}" for key, setting in value.items()) or "nothing"
    return "not given" if value is None else str(value)
