"""The one table of everything public in plywise: `plywise`, command line, documentation and arena read it.

To add a rule, write its file and its test, and add one line here. Then run ``python -m
plywise.registry.stub``, which writes the names for type checkers. This module imports neither torch nor
anything of plywise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RULE, LEARNER, SCHEDULE = "rule", "learner", "schedule"
OPTIMIZER, MODULE, LOSS, INIT = "optimizer", "module", "loss", "init"
PART = "part"

Interval = tuple[float, float, float] | tuple[float, float, float, bool]
"""Arguments of `plywise.arena.space.Range`: lowest, highest, default, and whether it is logarithmic."""


@dataclass(frozen=True)
class Name:
    """A public name.

    Attributes:
        name: the class or function.
        module: where it is defined, below ``plywise``.
        kind: what it is. A `PART` is public, but not a method, so it has no card.
        method: name of the method in the arena that is made of it; empty if there is none.
        tuned: for rules, the ranges of the hyper-parameters that the arena tunes.
        rate: range of the rate on SGD, for a rule whose updates do not have the size of the gradient. The
            decay is then 0, because SGD multiplies it by the rate. None: the usual range of SGD.
        fixed: hyper-parameters for which the arena does not use the default of the rule.
        maker: the module of `plywise.arena.methods` that makes the method, unless it is a rule or a learner.
        workload: the workload of the arena that has it as network.
        absence: the reason why the arena has neither a method nor a workload with it.
    """

    name: str
    module: str
    kind: str
    method: str = ""
    tuned: Mapping[str, Interval] = field(default_factory=dict)
    rate: Interval | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    maker: str = ""
    workload: str = ""
    absence: str = ""

    @property
    def room(self) -> str:
        """The folder in which it is defined."""
        return self.module.partition(".")[0]


_LOW_RANK = {"rank": 128, "stats_every": 10, "refresh_every": 10}
_SHORT = "It is a schedule for long runs, and these are short."
_INSIDE = "It is in the methods lrsgd-r, lrsgd-c and coda."
_CLOSED_FORM = "It is fitted in closed form, without steps. Its neurons are the method threshold."
_OWN_FIT = "It is an estimator of its own that trains no network."
_LAYER = "It is a layer; make a workload of a network of yours that has it."


def _make_rule(name: str, stem: str, tuned: Mapping[str, Interval] | None = None, **more: Any) -> Name:
    """Make the entry of a rule in ``rules/<stem>.py``; the arena names it like the file, with hyphens."""
    return Name(name, f"rules.{stem}", RULE, stem.replace("_", "-"), tuned or {}, **more)


def _make_related(name: str, module: str, kind: str, method: str, maker: str = "") -> Name:
    """Make the entry of an optimizer, module or loss that is a method of the arena."""
    return Name(name, module, kind, method, maker=f"related_{maker or 'losses'}")


def _make_peer(name: str, stem: str, method: str) -> Name:
    """Make the entry of an optimizer that is one of the peers in the arena."""
    return Name(name, f"optim.{stem}", OPTIMIZER, method)


def _make_part(name: str, module: str) -> Name:
    return Name(name, module, PART)


NAMES = (
    _make_rule("Backprop", "backprop"),
    _make_rule("ProxProp", "proxprop", {"tau": (0.01, 100.0, 1.0)}, rate=(0.03, 30.0, 2.0)),
    _make_rule("BackMatching", "back_matching", {"cap": (0.01, 10.0, 1.0)}, rate=(3e-4, 0.3, 0.02)),
    _make_rule("NLMS", "nlms", {"eps": (1e-3, 1.0, 0.1)}, rate=(0.03, 30.0, 2.0)),
    _make_rule("Consequentialism", "consequentialism", {"eps": (1e-3, 10.0, 0.1)}, rate=(1e-3, 1.0, 0.02)),
    _make_rule("RLS", "rls", {"gain": (0.01, 10.0, 0.1)}),
    _make_rule("FeatureWhitening", "feature_whitening", {"damping": (1e-5, 0.1, 1e-3)}),
    _make_rule("AdaBK", "adabk", {"damping": (1e-4, 1.0, 1e-2)}),
    _make_rule("KFAC", "kfac", {"damping": (0.01, 100.0, 1.0)}),
    _make_rule("Foof", "foof", {"damping": (0.01, 100.0, 1.0)}),
    _make_rule("Coordinates", "coordinates", {"damping": (1e-3, 10.0, 0.3)}),
    _make_rule(
        "Precondition",
        "precondition",
        {"damping": (1e-3, 10.0, 0.1)},
        fixed={**_LOW_RANK, "right": 0.5},
    ),
    _make_rule("GradientAmplification", "gradient_amplification", {"factor": (1.0, 10.0, 2.0)}),
    Name("AssociatedLearning", "local.associated_learning", LEARNER, "associated-learning"),
    Name("LocalLoss", "local.local_loss", LEARNER, "local-loss"),
    Name("LocalNextToken", "local.next_token", LEARNER, "local-next-token"),
    Name("Interlocking", "local.interlocking", LEARNER, "interlocking"),
    Name("CascadedForward", "local.cascaded_forward", LEARNER, "cascaded-forward"),
    Name("LocalForwardGradient", "local.forward_gradient", LEARNER, "local-forward-gradient"),
    Name("ActivationRelaxation", "local.activation_relaxation", LEARNER, "activation-relaxation"),
    Name("ForwardForward", "local.forward_forward", LEARNER, "forward-forward"),
    Name("MonoForward", "local.mono_forward", LEARNER, "mono-forward"),
    Name("DirectFeedback", "local.direct_feedback", LEARNER, "direct-feedback"),
    Name("MomentumAuxiliary", "local.momentum_auxiliary", LEARNER, "momentum-auxiliary"),
    Name("SCPL", "local.scpl", LEARNER, "scpl"),
    Name("LayerFreezing", "schedules.layer_freezing", SCHEDULE, absence=_SHORT),
    _make_peer("Muon", "muon", "muon"),
    _make_peer("NorMuon", "nor_muon", "normuon"),
    _make_peer("SOAP", "soap", "soap"),
    _make_peer("KLSOAP", "kl_soap", "kl-soap"),
    _make_related("LRSGDR", "optim.lrsgd", OPTIMIZER, "lrsgd-r", "optimizers"),
    _make_related("LRSGDC", "optim.lrsgd", OPTIMIZER, "lrsgd-c", "optimizers"),
    _make_related("YamAdam", "optim.yam_adam", OPTIMIZER, "yam-adam", "optimizers"),
    _make_related("SalpSGD", "optim.salp_sgd", OPTIMIZER, "salp-sgd", "optimizers"),
    _make_related("ASkewSGD", "optim.askew_sgd", OPTIMIZER, "askew-sgd", "optimizers"),
    Name("ProximalAnchor", "optim.anchor", OPTIMIZER, absence=_INSIDE),
    _make_related("AdaptiveActivation", "nn.adaptive_activation", MODULE, "adaptive-activations", "modules"),
    Name("UnfoldedDenoiser", "nn.unfolded_denoiser", MODULE, workload="digits-denoiser"),
    _make_related("Threshold", "nn.threshold", MODULE, "threshold", "modules"),
    Name("ThresholdNetwork", "nn.threshold", MODULE, absence=_CLOSED_FORM),
    Name("VSML", "nn.vsml", MODULE, workload="vsml-episodes"),
    _make_related("DecisionStage", "nn.decision_stage", MODULE, "decision-stage", "modules"),
    Name("ConvLSTM", "nn.conv_lstm", MODULE, absence=_LAYER),
    _make_related("AUCMargin", "losses.auc_margin", LOSS, "auc-margin"),
    _make_related("CoDA", "losses.coda", LOSS, "coda"),
    Name("SPAUC", "losses.spauc", LOSS, absence=_OWN_FIT),
    _make_related("slope_recovery", "losses.slope_recovery", LOSS, "slope-recovery", "modules"),
    _make_related("input_gradient_penalty", "losses.input_gradient_penalty", LOSS, "input-gradient-penalty"),
    _make_related("wasserstein_proximal", "losses.wasserstein_proximal", LOSS, "wasserstein-proximal"),
    _make_related("fuse_layers", "init.fuse_layers", INIT, "fuse-layers", "modules"),
    _make_part("PenaltyView", "rules.penalty_view"),
    _make_part("recommend", "training.recommended"),
    _make_part("Recommendation", "training.recommended"),
    _make_part("AttachError", "errors"),
    _make_part("BlockError", "errors"),
    _make_part("ContractError", "errors"),
    _make_part("NonFiniteError", "errors"),
    _make_part("PlywiseError", "errors"),
    _make_part("StateError", "errors"),
    _make_part("UncapturedLayerError", "errors"),
    _make_part("LinearCall", "engine.call"),
    _make_part("Update", "engine.call"),
    _make_part("LayerShape", "engine.contract"),
    _make_part("LinearMap", "engine.maps.base"),
    _make_part("rows", "engine.capture.masked_rows"),
    _make_part("LayerType", "engine.maps.registered"),
    _make_part("register_layer", "engine.maps.registered"),
    _make_part("register_map", "engine.maps.registered"),
    _make_part("Rule", "engine.rule"),
    _make_part("Size", "engine.rule"),
    _make_part("StatefulRule", "engine.rule"),
    _make_part("Blocks", "local.blocks"),
    _make_part("Component", "local.component"),
    _make_part("Learner", "local.learner"),
    _make_part("OneWayLearner", "local.learner"),
    _make_part("Signal", "local.component"),
    _make_part("split", "local.split"),
)
"""Everything that is public, with methods in the order in which they are listed."""

WORKLOAD_MODULES = {
    "quadratic": "arena.workloads.synthetic",
    "digits-mlp": "arena.workloads.digits",
    "digits-conv": "arena.workloads.digits",
    "digits-autoencoder": "arena.workloads.digits",
    "fashion-mlp": "arena.workloads.images",
    "fashion-2c2d": "arena.workloads.images",
    "mnist-autoencoder": "arena.workloads.images",
    "cifar-3c3d": "arena.workloads.images",
    "cifar-resnet": "arena.workloads.images",
    "char-transformer": "arena.workloads.text",
    "concrete": "arena.workloads.tables",
    "energy": "arena.workloads.tables",
    "california": "arena.workloads.tables",
    "boiling-points": "arena.workloads.tables",
    "digits-rare": "arena.workloads.related",
    "digits-generator": "arena.workloads.related",
    "digits-denoiser": "arena.workloads.related",
    "vsml-episodes": "arena.workloads.related",
}
"""The module of each workload that ships with the arena."""

ROOMS = ("arena", "init", "layers", "loggers", "losses", "nn", "optim", "testing")
"""Folders that are attributes of `plywise`. Names in the other folders are attributes themselves."""

RENAMED = {"MemoryRule": "StatefulRule", "Move": "Update", "Ply": "LinearCall"}
"""Names of plywise 0.1, with their present names."""


def list_names(*kinds: str) -> tuple[str, ...]:
    """List the names of one or several kinds, in the order of the table.

    Example:
        >>> list_names(INIT)
        ('fuse_layers',)
    """
    return tuple(entry.name for entry in NAMES if entry.kind in kinds)


def list_top_names() -> dict[str, str]:
    """Map each name that is an attribute of `plywise` itself to its module."""
    return {entry.name: entry.module for entry in NAMES if entry.room not in ROOMS}
