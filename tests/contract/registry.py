"""The rules that ship, as the contract in `plywise.testing` checks them, and a rule that a user might write.

Each test of this directory runs for each `Case` below. With ``--plywise-rule=my_rules:make`` it runs for a
rule of yours instead, as `plywise.testing.check_rule` does outside of this repository: ``make`` is a
factory without arguments, the rule's class, or a `plywise.testing.Case`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from plywise import (
    KFAC,
    NLMS,
    RLS,
    AdaBK,
    BackMatching,
    Backprop,
    Consequentialism,
    Coordinates,
    FeatureWhitening,
    Foof,
    GradientAmplification,
    LinearCall,
    Precondition,
    ProxProp,
    Rule,
    Update,
)
from plywise.engine.rule import Size, require_positive
from plywise.registry.names import NAMES, RULE
from plywise.testing.cases import Case, make_case


@dataclass(frozen=True, eq=False)
class DiagonalNewton(Rule):
    """A user's rule: each input's column of G divided by that input's own mean square."""

    eps: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, eps=self.eps)

    def update(self, ply: LinearCall) -> Update:
        squares = ply.rows(ply.dtype).square().mean(1)
        squares = squares + self.eps * squares.mean(1, keepdim=True)
        matrix = ply.matrix(ply.gradient()).to(ply.dtype)
        return ply.update(matrix / torch.where(squares > 0, squares, 1.0).unsqueeze(1))

    def input_gradient(self, ply: LinearCall) -> torch.Tensor:
        return ply.input_gradient() * 0.5

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        return 2.0 * size.g * (size.n + size.m) * size.d, float(size.g * size.n * size.d)


CURVES = "its step lengths depend on Δ: linear only along one Δ"
EPSILON = "adds 1e-6 to squared gradients, as the published code does: documented as not scale-free"
SQUARES = "its running ΔᵀΔ counts steps by the square of their loss scale: documented"

CASES = [
    Case("backprop", Backprop, rates=(0.5,), is_backprop=True),
    Case("proxprop", ProxProp, rates=(5.0,), family="proxprop"),
    Case("proxprop-cg", lambda: ProxProp(solver="cg"), rates=(5.0,), not_linear=CURVES, family="proxprop"),
    Case(
        "proxprop-cg_official",
        lambda: ProxProp(solver="cg_official"),
        rates=(5.0,),
        not_homogeneous=EPSILON,
        not_linear=CURVES,
        family="proxprop",
    ),
    Case(
        "proxprop-cg_flat",
        lambda: ProxProp(solver="cg_flat"),
        rates=(5.0,),
        not_linear=CURVES,
        family="proxprop",
    ),
    Case("proxprop-mean", lambda: ProxProp(gram="mean", tau=2.0), rates=(0.5,), family="proxprop"),
    Case("back_matching-mean", BackMatching, rates=(0.03,), refuses_reentrant=True, family="measured"),
    Case(
        "back_matching-rank",
        lambda: BackMatching(scalar="rank"),
        rates=(0.03,),
        refuses_reentrant=True,
        family="measured",
    ),
    Case(
        "back_matching-cauchy",
        lambda: BackMatching(scalar="cauchy"),
        rates=(0.1,),
        not_linear=CURVES,
        refuses_reentrant=True,
        family="measured",
    ),
    Case("back_matching-exact", lambda: BackMatching(mode="exact"), rates=(0.1,)),
    Case("nlms", NLMS, rates=(1.0,)),
    Case("cwu-append", Consequentialism, rates=(0.3,), family="cwu"),
    Case("cwu-centre", lambda: Consequentialism(bias="centre"), rates=(0.3,), family="cwu"),
    Case("users-own", DiagonalNewton, rates=(0.2,)),
    # Rules with memory refresh often here, so that a few steps see both kinds of step. A layer of a model
    # with several has its turn in another step than its neighbour.
    Case("rls", RLS, rates=(0.5,)),
    Case(
        "feature_whitening",
        lambda: FeatureWhitening(stats_every=1, refresh_every=2),
        rates=(0.5,),
        family="one-sided",
    ),
    Case(
        "adabk",
        lambda: AdaBK(stats_every=1, refresh_every=2),
        rates=(0.1,),
        remembers_scales=SQUARES,
        family="two-sided",
    ),
    Case(
        "kfac",
        lambda: KFAC(stats_every=1, refresh_every=2),
        rates=(0.5,),
        remembers_scales=SQUARES,
        family="two-sided",
    ),
    Case("coordinates", lambda: Coordinates(stats_every=2, refresh_every=2), rates=(0.5,), family="turned"),
    Case("foof", lambda: Foof(stats_every=2, refresh_every=2), rates=(0.5,), family="one-sided"),
    Case(
        "precondition-two-sided-low-rank",
        lambda: Precondition(left=0.25, right=0.5, rank=2, stats_every=1, refresh_every=3),
        rates=(0.5,),
        remembers_scales=SQUARES,
        family="two-sided",
    ),
    Case(
        "precondition-newton",
        lambda: Precondition(right=0.5, solver="newton", keep_norm=False, stats_every=1, refresh_every=2),
        rates=(0.3,),
        family="one-sided",
    ),
    # with this seed it amplifies most layers after the steps in which the tests let it learn
    Case(
        "gradient_amplification-signal",
        lambda: GradientAmplification(every=2, seed=6),
        rates=(0.1,),
        remembers_rows=False,
        family="amplified",
    ),
    Case(
        "gradient_amplification-gradient",
        lambda: GradientAmplification(mode="gradient", every=2, seed=6),
        rates=(0.1,),
        remembers_rows=False,
        family="amplified",
    ),
]
CASES += [
    Case(entry.method, getattr(import_module(f"plywise.{entry.module}"), entry.name))
    for entry in NAMES
    if entry.kind == RULE and not any(type(case.make()).__name__ == entry.name for case in CASES)
]
"""Every rule of the table is checked: those without a case of their own as they are by default."""


def selected(specifications: Sequence[str]) -> list[Case]:
    """The cases of the registry, or those of the given ``module:factory`` specifications."""
    return [make_case(text) for text in specifications] if specifications else CASES
