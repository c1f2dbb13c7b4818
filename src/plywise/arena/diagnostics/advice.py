"""Recommends a rule or an optimizer from a diagnosis, with the numbers behind it and how certain it is.

The thresholds are few and simple, each with its reason. The recommendations rest on ``benchmarks/README.md``,
that is, on small networks for classification. For other networks the advice says so. It always names the
bench that would decide.
"""

import math
import statistics
from dataclasses import dataclass

from plywise.arena.diagnostics.covariance import Inputs
from plywise.arena.diagnostics.diagnosis import Diagnosis, LayerDiagnosis

RATE_SPREAD = 100.0
"""Effective rates that differ by this factor are bad scaling. At initialisation the workloads that ship with
plywise have 1 to 38; the rescaled networks of ``benchmarks/bad_scaling.py`` have 800 to a million."""
BACKWARD_SPAN = 100.0
"""Backward values that shrink or grow by this factor from the last layer to the first. The shipped workloads
stay below 63; the network of that benchmark with all weights small has 140."""
UNEVEN = 3.0
"""Inputs are uneven if they have this many times as many directions as effective rank; white inputs, 1."""
CONDITION = 10.0
"""They also need a condition number this many times that of white inputs with as many rows."""
MOSTLY = 0.5
"""Advice on the whole network needs layers with this share of the parameters."""
MEAN_SHARE = 0.95
"""If the mean has this share in the squares of a network's inputs, it should be subtracted: it then exceeds
four standard deviations. Pixels from 0 to 1 have 0.3 to 0.7."""
SPREAD = 30.0
"""A feature of a network's inputs whose standard deviation is this many times the median has another unit.
The shipped workloads stay below 2."""
SILENT = 0.6
"""If this share of a layer's outputs has no gradient, something is wrong. At initialisation the shipped
workloads stay below 0.45."""
NARROW = 0.5
"""A layer is too wide for its inputs if less than this share of their directions varies."""
ROWS_TO_TELL = 2
"""Rows for each feature that are needed to tell whether a direction varies."""
LARGE = 3_000_000
"""For more parameters than this the benchmarks say little: their largest network has a tenth of it."""

MEASURED = "measured on a network of this kind"
ELSEWHERE = "measured, on another kind of network"
PLAIN = "follows from the numbers; not benchmarked"


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        method: rule or optimizer by the arena's name; empty where the advice is about data or network.
        title: the advice in a few words.
        reason: a sentence with the numbers that led to it.
        sure: how sure it is: ``MEASURED``, ``ELSEWHERE`` or ``PLAIN``, with what was measured.
        check: the command that would show it; empty where no bench does.
    """

    method: str
    title: str
    reason: str
    sure: str
    check: str = ""


def advice(diagnosis: Diagnosis, subject: str = "MODULE:FACTORY --data DATA") -> list[Advice]:
    """Return the advice that follows from a diagnosis, the most urgent first; never empty.

    Args:
        diagnosis: of a model as it is before training.
        subject: the options with which `plywise bench` trains the same model.

    Example:
        >>> from plywise.arena.diagnostics.diagnosis import diagnose_workload
        >>> from plywise.arena.workloads import find_workload
        >>> digits = find_workload("digits-conv")
        >>> advice(diagnose_workload(digits, digits.make_data()), "--workloads digits-conv")[0].method
        'foof+adamw'
    """
    findings = [*_about_inputs(diagnosis), *_about_silence(diagnosis), *_about_width(diagnosis)]
    methods = [*_about_scales(diagnosis, subject), *_about_conditioning(diagnosis, subject)]
    return [*findings, *methods] or [_advise_nothing(diagnosis, subject)]


def outlying(layer: LayerDiagnosis, diagnosis: Diagnosis) -> set[str]:
    """Return the unusual fields of a layer, among ``backward_to_last``, ``silent``, ``rate``, ``condition``.

    Example:
        >>> from plywise.arena.diagnostics.diagnosis import diagnose_workload
        >>> from plywise.arena.workloads import find_workload
        >>> digits = find_workload("digits-mlp")
        >>> found = diagnose_workload(digits, digits.make_data())
        >>> [sorted(outlying(layer, found)) for layer in found.layers[:1]]
        [['condition']]
    """
    logs = [math.log(other.rate) for other in diagnosis.layers if other.rate]
    middle = math.exp(statistics.median(logs)) if logs else 1.0
    far = math.sqrt(RATE_SPREAD)
    stands = {
        "backward_to_last": layer.backward_to_last is not None
        and _is_far(layer.backward_to_last, BACKWARD_SPAN),
        "silent": layer.silent is not None and layer.silent >= SILENT,
        "rate": layer.rate is not None and (layer.rate == 0 or _is_far(layer.rate / middle, far)),
        "condition": layer.read is not None and _is_uneven(layer.read),
    }
    return {name for name, does in stands.items() if does}


# ---- data and network ----------------------------------------------------------------------------


def _about_inputs(diagnosis: Diagnosis) -> list[Advice]:
    """Advise to normalise the network's inputs, if a layer reads them."""
    first = _list_measured(diagnosis)[:1]
    if not first or first[0].read is None or any("Embedding" in one.type for one in diagnosis.left):
        return []
    name, read, reasons = _name_layer(first[0]), first[0].read, []
    if read.mean_share > MEAN_SHARE:
        reasons.append(f"{read.mean_share:.1%} of the squares of its inputs are their mean")
    if read.spread is not None and read.spread > SPREAD:
        reasons.append(
            f"the standard deviation of its widest feature is {read.spread:.3g} times that of the middle one"
        )
    if not reasons:
        return []
    return [
        Advice(
            "",
            "Normalise the inputs",
            f"{name} comes first, and {' and '.join(reasons)}: subtract each feature's mean and divide by "
            "its standard deviation, then look again.",
            f"{PLAIN}.",
        )
    ]


def _about_silence(diagnosis: Diagnosis) -> list[Advice]:
    """Advise on outputs that no gradient reaches."""
    silent = [
        layer for layer in _list_measured(diagnosis) if layer.silent is not None and layer.silent >= SILENT
    ]
    if not silent:
        return []
    worst = max(silent, key=lambda layer: layer.silent or 0.0)
    return [
        Advice(
            "",
            "Wake the dead units",
            f"In {_list(silent)} {SILENT:.0%} of the outputs or more get a gradient of exactly 0 from every "
            f"sample ({_name_layer(worst)}: {worst.silent:.0%}), so that what feeds them does not learn: "
            "another initialisation or bias, or an activation that is not flat below 0.",
            f"{PLAIN}. No rule can move a weight without a gradient.",
        )
    ]


def _about_width(diagnosis: Diagnosis) -> list[Advice]:
    wide = [layer for layer in _list_measured(diagnosis) if layer.read and _is_too_wide(layer, layer.read)]
    if not wide:
        return []
    worst = min(wide, key=lambda layer: layer.read.rank / layer.inputs if layer.read else 1.0)
    assert worst.read is not None
    return [
        Advice(
            "",
            "Make it narrower",
            f"{_list(wide)}: the inputs vary in less than half of their directions ({_name_layer(worst)} "
            f"reads {worst.inputs} features, and {worst.read.rank} directions of {worst.read.features} vary "
            f"in {worst.read.rows} rows). Weights along the others learn nothing.",
            f"{PLAIN}. Before training; features may come to life later.",
        )
    ]


# ---- rules ---------------------------------------------------------------------------------------


def _about_scales(diagnosis: Diagnosis, subject: str) -> list[Advice]:
    """Advise on layers that are badly scaled against each other."""
    rates = [layer for layer in _list_measured(diagnosis) if layer.rate]
    spread, ratio = diagnosis.rate_spread, diagnosis.backward_ratio
    reasons = []
    if spread is not None and spread >= RATE_SPREAD:
        fast, slow = (choose(rates, key=lambda layer: layer.rate or 0.0) for choose in (max, min))
        reasons.append(
            f"effective rates differ by a factor of {spread:.3g} (a plain step at rate 1 moves "
            f"{_name_layer(fast)} by {fast.rate:.3g} of its weight, {_name_layer(slow)} by {slow.rate:.3g})"
        )
    if ratio is not None and _is_far(ratio, BACKWARD_SPAN):
        way = "shrink" if ratio > 1 else "grow"
        reasons.append(f"backward values {way} by a factor of {max(ratio, 1 / ratio):.3g} on their way down")
    if not reasons:
        return []
    why = f"The layers are badly scaled against each other: {'; '.join(reasons)}. "
    alike = _find_kind(diagnosis) == "mlp"
    measured = "one MLP of five layers for classification (benchmarks/README.md, bad_scaling.py)"
    return [
        Advice(
            "consequentialism",
            "Consequentialism, or fix the initialisation",
            f"{why}Of ten methods it ended with the lowest training loss on three of four bad scalings, "
            "ProxProp on the fourth; AdamW's was 5 to 35 times as much.",
            _say_how_sure(diagnosis, alike, measured),
            _make_command(subject, "sgd,adamw,consequentialism,proxprop"),
        ),
        Advice(
            "back-matching",
            "BackMatching, to be rid of the scales",
            "Its rate undoes factors that leave the network's function as it was: the same loss at the same "
            "rate on all three such scalings, 0.044; the two others need momentum.",
            _say_how_sure(diagnosis, alike, measured),
            _make_command(subject, "sgd,adamw,back-matching"),
        ),
    ]


def _about_conditioning(diagnosis: Diagnosis, subject: str) -> list[Advice]:
    """Advise on layers whose inputs are far from white."""
    layers = [layer for layer in _list_measured(diagnosis) if layer.read and layer.trains]
    uneven = [layer for layer in layers if layer.read and _is_uneven(layer.read)]
    share = sum(layer.parameters for layer in uneven) / max(1, diagnosis.parameters)
    if not uneven or share < MOSTLY:
        return []
    why = (
        f"{len(uneven)} of {len(layers)} layers, with {share:.0%} of the parameters, read inputs that are "
        f"far from white ({_describe_worst(uneven)}): plain gradients are slow in their weak directions. "
    )
    if _find_kind(diagnosis) == "convnet":
        return [
            Advice(
                "foof+adamw",
                "Foof or FeatureWhitening on AdamW",
                f"{why}Both undo that; a ConvNet on CIFAR-10 took 0.26 and 0.32 of AdamW's steps and 0.31 "
                "and 0.37 of its CPU time to AdamW's best loss.",
                _say_how_sure(
                    diagnosis,
                    True,
                    "one ConvNet of five layers for classification (benchmarks/README.md, memory_rules.py)",
                ),
                _make_command(subject, "adamw,muon,foof+adamw,feature-whitening+adamw"),
            )
        ]
    return [
        Advice(
            "feature-whitening+adamw",
            "FeatureWhitening on AdamW",
            f"{why}It undoes that; an MLP on Fashion-MNIST took 0.40 of AdamW's steps and 0.83 of its CPU "
            "time to AdamW's best loss.",
            _say_how_sure(
                diagnosis,
                _find_kind(diagnosis) == "mlp",
                "one MLP of three layers for classification (benchmarks/README.md, memory_rules.py)",
            ),
            _make_command(subject, "adamw,muon,feature-whitening+adamw"),
        )
    ]


def _describe_worst(layers: list[LayerDiagnosis]) -> str:
    """Return the layer whose inputs are farthest from white."""
    worst = max(layers, key=lambda layer: layer.read.condition or 0.0 if layer.read else 0.0)
    read = worst.read
    assert read is not None
    least = "at least " if read.at_least else ""
    return (
        f"{_name_layer(worst)}: condition number {least}{read.condition:.2g}, effective rank "
        f"{read.effective_rank:.3g} of {read.features}"
    )


def _advise_nothing(diagnosis: Diagnosis, subject: str) -> Advice:
    layers = _list_measured(diagnosis)
    if not layers:
        kinds = ", ".join(sorted({one.type for one in diagnosis.left})) or "nothing"
        why = f"No layer was seen that a rule handles; the parameters are in {kinds}."
        return Advice("", "Nothing can be said: no layer could be looked at", why, f"{PLAIN}.")
    rates = "" if diagnosis.rate_spread is None else f" effective rates within {diagnosis.rate_spread:.3g},"
    uneven = [layer for layer in layers if layer.read and _is_uneven(layer.read)]
    share = sum(layer.parameters for layer in uneven) / max(1, diagnosis.parameters)
    which = f"layers with {share:.0%} of the parameters read" if uneven else "no layer reads"
    why = (
        f"Nothing stands out:{rates} and {which} inputs that are far from white. A rule would have little "
        "to fix."
    )
    return Advice("adamw", "Plain AdamW is fine", why, f"{PLAIN}.", _make_command(subject, "sgd,adamw"))


# ---- judging -------------------------------------------------------------------------------------


def _is_uneven(read: Inputs) -> bool:
    if read.condition is None or read.effective_rank is None:
        return False
    directions = read.features - read.constant
    by_chance = read.white if read.white is not None else math.inf
    # with fewer rows than features the condition number says nothing, and rows bound the effective rank
    is_ill = read.white is None or read.condition >= CONDITION * by_chance
    return is_ill and min(directions, read.rows) >= UNEVEN * read.effective_rank


def _is_too_wide(layer: LayerDiagnosis, read: Inputs) -> bool:
    return read.rows >= ROWS_TO_TELL * read.features and read.rank < NARROW * read.features


def _is_far(ratio: float, factor: float) -> bool:
    return not 1 / factor < ratio < factor


def _find_kind(diagnosis: Diagnosis) -> str:
    """``"mlp"``, ``"convnet"`` or ``"other"``."""
    layers = _list_measured(diagnosis)
    if any(layer.type.startswith("Conv") for layer in layers):
        return "convnet"
    flat = len(layers) > 1 and all(layer.rows == 1 and layer.uses == 1 for layer in layers)
    left = {one.type for one in diagnosis.left}
    return "mlp" if flat and not left - {"BatchNorm1d", "LayerNorm"} else "other"


def _say_how_sure(diagnosis: Diagnosis, same_kind: bool, on: str) -> str:
    if diagnosis.parameters > LARGE:
        return f"{ELSEWHERE}: {on}; yours has {diagnosis.parameters / 1e6:.3g} million parameters."
    return f"{MEASURED if same_kind else ELSEWHERE}: {on}."


def _make_command(subject: str, methods: str) -> str:
    return f"plywise bench {subject} --methods {methods}"


def _list_measured(diagnosis: Diagnosis) -> list[LayerDiagnosis]:
    return [layer for layer in diagnosis.layers if layer.uses]


def _name_layer(layer: LayerDiagnosis) -> str:
    return f"layer {layer.name!r}" if layer.name else f"the {layer.type}"


def _list(layers: list[LayerDiagnosis]) -> str:
    names = ", ".join(_name_layer(layer) for layer in layers[:3])
    return f"{names} and {len(layers) - 3} more" if len(layers) > 3 else names
