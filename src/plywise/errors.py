"""The errors plywise raises: each says what, in which layer, why, and how to mend it."""

from typing import ClassVar

MORE = "More: "
"""What the note of every error of ours begins with."""


class PlywiseError(RuntimeError):
    """Something plywise refuses to do silently.

    Attributes:
        page: where the documentation says more; tracebacks and commands show it.
    """

    page: ClassVar[str] = "docs/reference/errors.md#plywise-error"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(f"{MORE}{self.page}")


class AttachError(PlywiseError):
    """A rule cannot be attached to (or used on) this model or optimizer."""

    page = "docs/reference/errors.md#attach-error"


class NonFiniteError(PlywiseError):
    """A NaN or infinity reached a layer and the run was asked to stop there."""

    page = "docs/reference/errors.md#non-finite-error"


class UncapturedLayerError(PlywiseError):
    """A layer received a gradient that did not pass through its rule."""

    page = "docs/reference/errors.md#uncaptured-layer-error"


class StateError(PlywiseError):
    """A saved memory does not fit the model or the rule that it is loaded into."""

    page = "docs/reference/errors.md#state-error"


class BlockError(PlywiseError):
    """A network does not come apart into blocks, or blocks do not fit together."""

    page = "docs/reference/errors.md#block-error"


class PipelineError(PlywiseError):
    """A pipeline cannot start or go on: a stage is lost, or something between stages does not fit."""

    page = "docs/reference/errors.md#pipeline-error"
