"""Resolves the names that users give: models, data, rules, learners, optimizers, losses and metrics.

Each is the name of something in plywise or torch, or an address ``module:name``. Every command accepts and
refuses the same names. The arena's methods, which are made of these, are found by
`plywise.arena.methods.find_method`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.import_path import call_factory, load
from plywise._util.suggest import suggestion
from plywise.data.own_data import AS_EVER, OwnData, Parts, cut_parts, read_parts
from plywise.data.parts import Data
from plywise.data.sources import Reading
from plywise.engine.rule import Rule
from plywise.errors import AddressError, CommandError
from plywise.local.learner import Learner
from plywise.registry.find import find_learner, find_rule
from plywise.registry.names import WORKLOAD_MODULES


def resolve_rule(name: str) -> type[Rule]:
    """Find the rule called ``name``, or the user's subclass of `plywise.Rule` at the address ``name``.

    Raises:
        PlywiseError: there is none.

    Example:
        >>> resolve_rule("proxprop") is resolve_rule("plywise:ProxProp")
        True
    """
    return _resolve_class(name, "your rule", Rule, "plywise.Rule") if ":" in name else find_rule(name)


def resolve_learner(name: str) -> type[Learner]:
    """Find the local learner called ``name``, or the user's subclass of `plywise.Learner` at that address.

    Raises:
        PlywiseError: there is none.

    Example:
        >>> resolve_learner("LocalLoss").__name__
        'LocalLoss'
    """
    return (
        _resolve_class(name, "your learner", Learner, "plywise.Learner")
        if ":" in name
        else find_learner(name)
    )


def resolve_optimizer(name: str) -> type[Optimizer]:
    """Find the class in `torch.optim` called ``name``, or the one at the address ``name``.

    Raises:
        PlywiseError: there is none.

    Example:
        >>> resolve_optimizer("SGD"), resolve_optimizer("plywise.optim:YamAdam").__name__
        (<class 'torch.optim.sgd.SGD'>, 'YamAdam')
    """
    if ":" in name:
        return _resolve_class(name, "your optimizer", Optimizer, "torch.optim.Optimizer")
    known: dict[str, type[Optimizer]] = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name not in known:
        hint = suggestion(name, tuple(known)) or f"There are: {', '.join(sorted(known))}."
        raise CommandError(f"torch.optim has no optimizer {name!r}. {hint}".rstrip())
    return known[name]


def resolve_function(address: str, what: str) -> Callable[[Any, Any], Tensor]:
    """Find a loss or metric (of outputs and targets) or a step function (of a model and a batch).

    Args:
        address: ``module:name``.
        what: its name in errors, such as "your loss".

    Raises:
        PlywiseError: there is none.

    Example:
        >>> resolve_function("torch.nn.functional:cross_entropy", "your loss").__name__
        'cross_entropy'
    """
    function: Callable[[Any, Any], Tensor] = load(address, what)
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise AddressError(f"{address} is {kind}, not a function of two arguments.")
    return function


def make_model(address: str) -> Any:
    """Call the user's function at ``module:name``, which makes a new network or a list of blocks.

    Raises:
        PlywiseError: there is no such function, it is itself a network, or its result is neither of the two.
    """
    if isinstance(load(address, "your model"), nn.Module):
        raise AddressError(
            f"{address} is a network. Training needs a function that makes it: its weights must follow from "
            "the seed."
        )
    return call_factory(address, "your model")


def resolve_parts(address: str, reading: Reading = AS_EVER) -> Parts:
    """Read the data at an address (see `plywise.data.own_data.read_parts`), or of a workload of plywise.

    Args:
        address: where the data are.
        reading: how to read them. By default, options that are not given are guessed.

    Raises:
        PlywiseError: there are no such data, they hold NaN or infinity, or parts do not fit one another.
    """
    if address not in WORKLOAD_MODULES:
        return read_parts(address, reading)
    module = import_module(f"plywise.{WORKLOAD_MODULES[address]}")
    workload = next(one for one in module.WORKLOADS if one.name == address)
    return Parts(vars(workload.make_data()))


def resolve_data(address: str, reading: Reading = AS_EVER) -> OwnData:
    """Read the data at an address in three parts, which are cut at random by a fixed seed if necessary.

    Args:
        address: see `resolve_parts`.
        reading: see `resolve_parts`.

    Raises:
        PlywiseError: see `resolve_parts`; or there are fewer than 10 samples to cut.

    Example:
        >>> resolve_data("digits-mlp").data.test.x.shape
        torch.Size([400, 64])
    """
    parts = resolve_parts(address, reading)
    if address == "digits" or address in WORKLOAD_MODULES:
        return OwnData(Data(**parts), f"the data of {address}")
    return cut_parts(address, parts)


def _resolve_class(address: str, what: str, base: type[Any], public: str) -> Any:
    found = load(address, what)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AddressError(f"{address} is not a subclass of {public}.")
    return found
