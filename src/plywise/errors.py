"""The errors plywise raises: each says what, in which layer, why, and how to fix it."""

import re
from typing import Any

PAGE = "docs/reference/errors.md"
"""Where the documentation says more of errors."""

MORE = "More: plywise help "
"""What the note of every error of ours begins with; the name of a section follows."""


class PlywiseError(RuntimeError):
    """Base class of plywise's errors.

    Args:
        args: what is wrong, where, why, and how to fix it.
        see: the anchor of the section about just this, on the page of errors. Default: that of the class.

    Attributes:
        page: where the documentation says more. Tracebacks and commands show how to print it.
    """

    page: str = f"{PAGE}#plywise-error"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__ == __name__:  # classes of others keep the section of their base
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__)
            cls.page = f"{PAGE}#{words.lower()}"

    def __init__(self, *args: object, see: str | None = None) -> None:
        super().__init__(*args)
        if see is not None:
            self.page = f"{PAGE}#{see}"
        self.add_note(f"{MORE}{self.page.partition('#')[2]}")


class AddressError(PlywiseError):
    """An address, as in ``module:name``, leads to nothing, or to something of the wrong kind."""


class DataError(PlywiseError):
    """Data cannot be read, or do not fit the model or what is asked of them."""


class FileError(PlywiseError):
    """A file or a folder cannot be read or written, for a reason of the system."""


class CommandError(PlywiseError):
    """A flag, a setting or a name is unknown, or does not fit the others."""


class BenchError(PlywiseError):
    """A comparison cannot be made as it was asked for, or its folder cannot be read."""


class CardError(PlywiseError):
    """The docstring of a method is not a card."""


class MissingPackageError(PlywiseError):
    """A package that is not installed with plywise is missing, or broken."""


class TestingError(PlywiseError):
    """A check of a rule or a learner cannot begin."""


class AttachError(PlywiseError):
    """A rule cannot be attached to (or used on) this model or optimizer."""


class NonFiniteError(PlywiseError):
    """A NaN or infinity reached a layer and the run was asked to stop there."""


class UncapturedLayerError(PlywiseError):
    """A layer received a gradient that did not pass through its rule."""


class StateError(PlywiseError):
    """A saved memory does not fit the model or the rule that it is loaded into."""


class BlockError(PlywiseError):
    """A network cannot be cut into blocks, or blocks do not fit together."""


class ContractError(PlywiseError, AssertionError):
    """A rule or a learner does not keep what plywise promises of it.

    Attributes:
        result: what came of the check, a `plywise.testing.ContractResult`.
    """

    result: Any = None


class PipelineError(PlywiseError):
    """A pipeline cannot start or go on: a stage is lost, or something between stages does not fit."""
