"""plywise's rules as methods, each on any optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from plywise.arena.method import Method, Trainer, TrialContext, end_to_end
from plywise.arena.methods import PEERS, RECOMMENDED, RULE_OF
from plywise.arena.methods.peers import Peer, find_peer, unit_sized
from plywise.arena.space import MOST_TUNED, Range, Space, get_defaults
from plywise.engine.rule import Rule
from plywise.registry.card import read_card
from plywise.registry.names import NAMES, RULE
from plywise.registry.resolve import resolve_rule
from plywise.training.recommended import recommend

BATCH = 128
"""Batch size that `plywise.recommend` assumes, for a trial does not know its workload's."""


@dataclass(frozen=True)
class Tuned:
    """What may be tuned about a rule, beside its optimizer's numbers.

    Attributes:
        numbers: ranges of its hyper-parameters.
        rate: range of the rate on SGD, if the rule's updates do not have the gradient's size. The decay is
            then off, since SGD multiplies it by the rate. None: SGD's own numbers.
        fixed: hyper-parameters that are not the rule's defaults.
    """

    numbers: Space = field(default_factory=dict)
    rate: Range | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


TUNED = {
    entry.name: Tuned(
        {name: Range(*interval) for name, interval in entry.tuned.items()},
        Range(*entry.rate) if entry.rate else None,
        entry.fixed,
    )
    for entry in NAMES
    if entry.kind == RULE
}
"""By the rules' names."""


def list_tuned(rule: type[Rule]) -> Tuned:
    """Return what may be tuned about a rule; nothing for a user's own rule."""
    return TUNED[rule.__name__] if rule.__module__.startswith("plywise.rules.") else Tuned()


def wrap_rule(name: str, optimizer: str) -> Method:
    """Return a rule on an optimizer as a method; on SGD it has the rule's name alone.

    Args:
        name: a key of ``RULE_OF``, or the address of a rule's class.
        optimizer: one of ``PEERS``, or the address of an optimizer's class.

    Raises:
        PlywiseError: there is no optimizer, or no rule, at the address.

    Example:
        >>> list(wrap_rule("proxprop", "adamw").space)
        ['lr', 'tau']
    """
    rule, peer = resolve_rule(RULE_OF.get(name, name)), find_peer(optimizer)
    tuned = list_tuned(rule)
    on_sgd = peer.name == PEERS[0]
    fixed = get_defaults(peer.space)
    if on_sgd and tuned.rate is not None:
        fixed |= {"weight_decay": 0.0}
    space = _choose_space(tuned, peer, on_sgd)

    def make(setting: TrialContext) -> Trainer:
        own = {key: value for key, value in setting.numbers.items() if key in tuned.numbers}
        theirs = {key: value for key, value in setting.numbers.items() if key not in tuned.numbers}
        made = peer.make(setting, fixed | theirs)
        return peer.train(setting, made, rule(**tuned.fixed, **own))

    idea = _describe(rule, name)
    about = f"{idea[:1].upper()}{idea[1:]}; on {peer.about}."
    return Method(name if on_sgd else f"{name}+{peer.name}", about, space, make, needs=peer.needs)


def _describe(rule: type[Rule], name: str) -> str:
    if name in RULE_OF:
        return read_card(rule).tagline
    return (rule.__doc__ or rule.__name__).strip().split("\n")[0].rstrip(".")


def _choose_space(tuned: Tuned, peer: Peer, on_sgd: bool) -> Space:
    """Return the rate and the rule's number; for a rule without one, the optimizer's second."""
    if on_sgd and tuned.rate is not None:
        return {"lr": tuned.rate, **tuned.numbers}
    rate = {name: one for name, one in peer.space.items() if name == "lr"}
    ranges = {**rate, **tuned.numbers, **peer.space}
    return dict(islice(ranges.items(), MOST_TUNED))


def make_recommended() -> Method:
    """Return what `plywise.recommend` makes, as a method."""

    def make(setting: TrialContext) -> Trainer:
        # in a tuple: a user's model takes its whole batch, whatever that is, as one argument
        batch = (setting.example,)
        numbers = dict(setting.numbers)
        # as all rules are attached here: a run that diverges counts as failed
        chosen = recommend(setting.model, batch=batch, batch_size=BATCH, on_nonfinite="propagate", **numbers)
        return end_to_end(setting, chosen.optimizer)

    about = "Muon and AdamW, in coordinates where these are worth their time (plywise.recommend)"
    return Method(RECOMMENDED, about, unit_sized(2e-2, 0.1, 0.2), make)  # the space of Muon
