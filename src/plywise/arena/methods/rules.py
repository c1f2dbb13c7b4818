"""plywise's rules as methods, each on any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from plywise.arena.method import Method, Setting, Trainer, end_to_end
from plywise.arena.methods import PEERS, RULE_OF
from plywise.arena.methods.peers import Peer, find_peer
from plywise.arena.space import MOST_TUNED, Range, Space, defaults
from plywise.registry.card import card_of
from plywise.registry.find import find_rule
from plywise.registry.names import NAMES, RULE


@dataclass(frozen=True)
class Tuned:
    """What may be tuned about a rule, beside its optimizer's numbers.

    Attributes:
        numbers: ranges of its hyper-parameters.
        rate: the rate on SGD, where the rule's moves are not of the gradient's size. The decay is then off,
            since SGD multiplies it by the rate. None: SGD's own numbers.
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


def of_rule(name: str, optimizer: str) -> Method:
    """A rule on an optimizer as a method; on SGD it has the rule's name alone.

    Args:
        name: a key of ``RULE_OF``.
        optimizer: one of ``PEERS``, or the address of an optimizer's class.

    Raises:
        PlywiseError: there is no optimizer at the address.

    Example:
        >>> list(of_rule("proxprop", "adamw").space)
        ['lr', 'tau', 'weight_decay']
    """
    rule, peer = find_rule(RULE_OF[name]), find_peer(optimizer)
    tuned = TUNED[rule.__name__]
    on_sgd = peer.name == PEERS[0]
    fixed = defaults(peer.space)
    if on_sgd and tuned.rate is not None:
        fixed |= {"weight_decay": 0.0}
    space = _space(tuned, peer, on_sgd)

    def make(setting: Setting) -> Trainer:
        own = {key: value for key, value in setting.numbers.items() if key in tuned.numbers}
        theirs = {key: value for key, value in setting.numbers.items() if key not in tuned.numbers}
        made = peer.make(setting, fixed | theirs)
        return end_to_end(setting, made, rule(**tuned.fixed, **own))

    about = f"{card_of(rule).tagline} On {peer.about}."
    return Method(name if on_sgd else f"{name}+{peer.name}", about, space, make, needs=peer.needs)


def _space(tuned: Tuned, peer: Peer, on_sgd: bool) -> Space:
    """The rate, the rule's numbers, and as many of the optimizer's others as there is room for."""
    if on_sgd and tuned.rate is not None:
        return {"lr": tuned.rate, **tuned.numbers}
    rate = {"lr": peer.space["lr"]} if "lr" in peer.space else {}
    return dict(islice(chain(rate.items(), tuned.numbers.items(), _others(peer)), MOST_TUNED))


def _others(peer: Peer) -> list[tuple[str, Range]]:
    return [(name, one) for name, one in peer.space.items() if name != "lr"]
