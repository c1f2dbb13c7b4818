"""Where in the arena each of plywise's methods is met: as a method, as a workload, or why it is not."""

from __future__ import annotations

from plywise.arena.methods import LEARNER_OF, RELATED, RULE_OF
from plywise.errors import PlywiseError

METHOD_OF = {
    thing: name for names in (RULE_OF, LEARNER_OF, *RELATED.values()) for name, thing in names.items()
}
"""The arena's method, by the name of what it is made of."""

WORKLOAD_OF = {"UnfoldedDenoiser": "digits-denoiser", "VSML": "vsml-episodes"}
"""The workload whose network it is."""

ELSEWHERE = {
    "LayerFreezing": "It is a schedule for long runs, and these are short.",
    "ProximalAnchor": "It is in the methods lrsgd-r, lrsgd-c and coda.",
    "ThresholdNetwork": "It is fitted in closed form, without steps. Its neurons are the method threshold.",
    "SPAUC": "It is an estimator of its own that trains no network.",
    "ConvLSTM": "It is a layer; make a workload of a network of yours that has it.",
}
"""Why there is neither."""


def place_of(name: str) -> str:
    """Where something of the catalogue is met in the arena, in a sentence.

    Raises:
        PlywiseError: nothing is known of it.

    Example:
        >>> place_of("Foof")
        'The method foof: plywise bench --workloads quick --methods sgd,foof'
        >>> place_of("VSML")
        'The network of a workload: plywise bench --workloads vsml-episodes'
    """
    if name in METHOD_OF:
        method = METHOD_OF[name]
        where = "digits-rare" if name in ("AUCMargin", "CoDA") else "quick"
        return f"The method {method}: plywise bench --workloads {where} --methods sgd,{method}"
    if name in WORKLOAD_OF:
        return f"The network of a workload: plywise bench --workloads {WORKLOAD_OF[name]}"
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    raise PlywiseError(f"Of {name} it is not known where it stands in the arena: say so in {__name__}.")
