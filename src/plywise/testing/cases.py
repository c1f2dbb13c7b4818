"""Descriptions of the rules and learners that the contract checks."""

import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plywise._util.import_path import load
from plywise.engine.answers import read_settings
from plywise.engine.rule import Rule
from plywise.errors import MORE, BlockError, PlywiseError, TestingError
from plywise.local.blocks import Blocks
from plywise.local.learner import Learner
from plywise.testing.contract.learners import CLASSES, make_adam, make_data, make_halving, make_modules
from plywise.testing.contract.models import compute_loss, make_batch, make_mlp


@dataclass(frozen=True)
class Case:
    """A rule, and the facts about it that the contract needs.

    Attributes:
        name: test id.
        make: makes a new, unattached rule.
        rates: learning rates, with at least one of which plain SGD trains a small, well-scaled network.
        adaptive_rates: the same for RMSprop and Adam.
        not_homogeneous: why a loss times c does not give updates times c; "" if it does.
        not_linear: why the update of a sum of losses is not the sum of the updates; "" if it is.
        is_backprop: whether its gradients are autograd's own.
        refuses_reentrant: whether it raises PlywiseError in a reentrant checkpoint, which hides the graph.
        remembers_scales: why a loss scale that changes between steps changes the updates; "" if it does not.
        remembers_rows: whether its running state of a layer is made from the rows of the layer, and has its
            sizes.
        family: rules of one family run the same code with other settings; "" if there is no other rule.
    """

    name: str
    make: Callable[[], Rule]
    rates: tuple[float, ...] = (0.1, 1.0, 0.01)
    adaptive_rates: tuple[float, ...] = (0.01, 0.001)
    not_homogeneous: str = ""
    not_linear: str = ""
    is_backprop: bool = False
    refuses_reentrant: bool = False
    remembers_scales: str = ""
    remembers_rows: bool = True
    family: str = ""


@dataclass(frozen=True)
class LearnerCase:
    """A learner, and the facts about it that the contract needs.

    Attributes:
        name: test id.
        kind: makes the learner: ``kind(blocks, num_classes, **training)``, as the learners of plywise do.
            ``training`` holds ``optimizer``, ``scheduler``, ``callbacks`` and ``seed``.
        raises: whether it refuses a batch that is not finite; other learners skip the step.
        optimizes: whether it takes an ``optimizer`` and a ``scheduler``; False if it learns in closed form.
        draws_nothing: why other seeds give the same numbers, though a block has dropout; "" if they do not.
        takes_any_targets: why it checks no targets (its loss does); "" if it checks them.
        keeps_activations: why the activations of a block may still exist when the next one runs; "" if not.
    """

    name: str
    kind: Callable[..., Learner]
    raises: bool = False
    optimizes: bool = True
    draws_nothing: str = ""
    takes_any_targets: str = ""
    keeps_activations: str = ""

    def make(self, weights: int = 1, modules: Sequence[nn.Module] = (), **training: Any) -> Learner:
        """Make the learner on ``modules``, by default three blocks whose parameters ``weights`` draws."""
        if self.optimizes:
            training = {"optimizer": make_adam, "scheduler": make_halving, **training}
        return self.kind(Blocks(modules or make_modules(weights), torch.zeros(4, 6)), CLASSES, **training)


def make_learner_case(factory: Callable[..., Learner] | LearnerCase) -> LearnerCase:
    """Make the case of a function that makes a learner, or return a case, once it makes a learner.

    Raises:
        PlywiseError: it makes none.

    Example:
        >>> import plywise as pw
        >>> make_learner_case(pw.LocalLoss).name
        'LocalLoss'
    """
    if not callable(factory) and not isinstance(factory, LearnerCase):
        raise TestingError(
            "check_learner needs a function of blocks and the number of classes that makes a learner, "
            f"not {type(factory).__name__}."
        )
    case = factory
    if not isinstance(case, LearnerCase):
        case = LearnerCase(getattr(factory, "__name__", "learner"), case)
    names = "optimizer=…, scheduler=…, " if case.optimizes else ""
    call = f"{case.name}(blocks, {CLASSES}, {names}callbacks=…, seed=…)"
    advice = (
        "check_learner calls it so; pass a function that takes these arguments, and see "
        "plywise.testing.LearnerCase for a learner without an optimizer."
    )
    with _refuse_errors(call, advice):
        made: object = case.make(callbacks=[], seed=0)
    if not isinstance(made, Learner):
        raise TestingError(f"{call} returned a {type(made).__name__}, and must return a plywise.Learner.")
    x, y = make_data(0)
    with _refuse_errors(f"The first step of {case.name}, on a batch of {tuple(x.shape)},"):
        made.step(x, y)
    with _refuse_errors(f"{case.name}.as_module()"):
        module: object = made.as_module()
    if not isinstance(module, nn.Module):
        raise TestingError(
            f"{case.name}.as_module() returned a {type(module).__name__}, and must return the network that "
            "predicts, an nn.Module."
        )
    return case


@contextmanager
def _refuse_errors(what: str, advice: str = "") -> Iterator[None]:
    """Raise TestingError in place of what the user's code raises, and keep the caller's random numbers."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:
        # a block that fails is the user's, as what raises other errors is
        if isinstance(error, PlywiseError) and not (isinstance(error, BlockError) and error.__cause__):
            raise
        raise TestingError(f"{what} raised {describe_error(error)}. {advice}".strip()) from error


LIBRARIES = tuple(
    str(Path(path).resolve())
    for path in (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
)
"""Folders of code that is not the user's."""


def describe_error(error: BaseException) -> str:
    """Describe an error in a line: its kind, where in the user's code it was raised, what it says."""
    raised = error.__cause__ or error
    theirs = [
        frame for frame in traceback.extract_tb(raised.__traceback__) if _is_users(Path(frame.filename))
    ]
    where = f" in {Path(theirs[-1].filename).name}, line {theirs[-1].lineno}" if theirs else ""
    notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith(MORE)]
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return ". ".join([f"{type(error).__name__}{where}: {first}".rstrip(": "), *notes]).rstrip(".")


def _is_users(path: Path) -> bool:
    """Tell whether a file is neither plywise's nor a library's."""
    resolved = str(path.resolve())
    return path.is_file() and not any(resolved.startswith(folder) for folder in LIBRARIES)


def make_case(factory: Callable[[], Rule] | Case | str) -> Case:
    """Make the case of a factory (such as a rule's class) or of ``module:name``, or return a case.

    Raises:
        PlywiseError: it makes no rule.

    Example:
        >>> import plywise as pw
        >>> make_case(pw.NLMS).name, make_case("plywise:NLMS").make()
        ('NLMS', NLMS(eps=0.1, reduction='mean'))
    """
    name = getattr(factory, "__name__", str(factory))
    if isinstance(factory, str):
        factory = load(factory, "your rule")
    if isinstance(factory, Case):
        return factory
    assert not isinstance(factory, str)
    try:
        made = factory() if callable(factory) else None
        makes_rule, why = isinstance(made, Rule), ""
    except TypeError as error:  # it needs arguments
        makes_rule, why = False, f" ({error})"
    if not makes_rule:
        raise TestingError(
            f"{name} must be a plywise.testing.Case, or make a plywise.Rule when it is called without "
            f"arguments{why}."
        )
    read_settings(made)  # a class that is no dataclass would break every promise
    return Case(name, factory)


def try_step(case: Case) -> None:
    """Let a rule take one step on a small network.

    A rule that cannot would fail in nearly every test.

    Raises:
        PlywiseError: it fails.
    """
    with _refuse_errors(f"The first step of {case.name}, on a small network,"):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=case.rates[0])
        rule = case.make().attach(model, optimizer)
        compute_loss(model, make_batch()).backward()
        optimizer.step()
        rule.detach()


def select_family(case: Case, cases: Sequence[Case], turn: int) -> bool:
    """Tell whether ``case`` is the one of its family that is tested."""
    family = [other.name for other in cases if case.family and other.family == case.family]
    return not family or family[turn % len(family)] == case.name


def find_why_stuck(made: object) -> str:
    """Find why other processes cannot import the class of an object; "" if they can."""
    kind = type(made)
    if kind.__module__ == "__main__":
        return f"{kind.__name__} is in __main__, where no other process finds it: put it in a module"
    if "<locals>" in kind.__qualname__:
        return f"{kind.__name__} is defined in a function, where no other process finds it"
    return ""
