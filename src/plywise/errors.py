"""The errors plywise raises: each says what, in which layer, why, and how to mend it."""


class PlywiseError(RuntimeError):
    """Something plywise refuses to do silently."""


class AttachError(PlywiseError):
    """A rule cannot be attached to (or used on) this model or optimizer."""


class NonFiniteError(PlywiseError):
    """A NaN or infinity reached a layer and the run was asked to stop there."""


class UncapturedLayerError(PlywiseError):
    """A layer received a gradient that did not pass through its rule."""


class StateError(PlywiseError):
    """A saved memory does not fit the model or the rule that it is loaded into."""


class BlockError(PlywiseError):
    """A network does not come apart into blocks, or blocks do not fit together."""


class PipelineError(PlywiseError):
    """A pipeline cannot start or go on: a stage is lost, or something between stages does not fit."""
