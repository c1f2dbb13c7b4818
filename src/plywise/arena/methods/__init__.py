"""The arena's methods by name. Listing names costs no import of torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from plywise._util.suggest import suggestion
from plywise.errors import BenchError
from plywise.registry.names import LEARNER, NAMES, RULE

if TYPE_CHECKING:
    from plywise.arena.method import Method

PEERS = ("sgd", "adamw", "muon", "torch-muon", "normuon", "soap", "kl-soap", "schedule-free", "shampoo")
"""Established optimizers; targets are taken from these, and rules compose with them."""

USUAL = ("sgd", "sgd-again", "adamw", "muon", "proxprop", "feature-whitening+adamw", "foof+adamw")
"""What a bench compares by default."""

NULL_CONTROL = "sgd-again"
"""The first peer a second time: a difference between these two is noise."""

RULE_OF = {entry.method: entry.name for entry in NAMES if entry.kind == RULE}
"""The rule of each method that is one, on SGD with Nesterov momentum."""

LEARNER_OF = {entry.method: entry.name for entry in NAMES if entry.kind == LEARNER}
"""The local learner of each method that is one."""

ON_ADAMW = ("foof+adamw", "feature-whitening+adamw", "adabk+adamw")
"""Rules that do better on AdamW than on SGD in our benchmarks."""

RECOMMENDED = "recommended"
"""What `plywise.recommend` makes: Muon and AdamW, in coordinates where these are worth their time."""

RELATED = {
    maker: {entry.method: entry.name for entry in NAMES if entry.maker == maker}
    for maker in ("related_optimizers", "related_losses", "related_modules")
}
"""Methods made of the related papers' optimizers, losses and modules, by the module that makes them."""

_HOMES = {name: home for home, made in RELATED.items() for name in made}
RELATIVES = tuple(_HOMES)
"""Names of all of these."""

METHODS = (*PEERS, NULL_CONTROL, RECOMMENDED, *RULE_OF, *ON_ADAMW, *LEARNER_OF, *RELATIVES)
"""Names of the methods that are ready; any ``rule+optimizer`` or ``learner+rule`` is one more."""

_ALIASES = {"whitening": "feature-whitening", "cwu": "consequentialism", "cafo": "cascaded-forward"}
_LISTED = (*PEERS, NULL_CONTROL, RECOMMENDED, *RULE_OF, *LEARNER_OF, *RELATIVES)
_KNOWN = {name.replace("-", ""): name for name in _LISTED}
_KNOWN |= _ALIASES


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Letters' case and hyphens do not matter. A name is one of

    - ``METHODS``, or ``whitening``, ``cwu``, ``cafo``;
    - ``rule+optimizer``: a rule, and a peer or the address of an optimizer's class;
    - ``learner+rule``: a local learner, and the rule that acts inside its components;
    - ``module:name``: the address of a `torch.optim.Optimizer` class, of a `Method`, or of a rule's class,
      which may stand for a rule in the other forms, too.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_method("ProxProp").name, find_method("proxprop+adamw").name
        ('proxprop', 'proxprop+adamw')
        >>> find_method("torch.optim:RAdam").space["lr"].default
        0.001
    """
    first, plus, second = name.partition("+")
    if plus:
        return _compose(name, first, second)
    if ":" in name:
        return _load_method(name)
    found = _normalise_name(name)
    if found in RULE_OF:
        return _compose(name, name, PEERS[0])
    if found in LEARNER_OF:
        from plywise.arena.methods.learners import wrap_learner

        return wrap_learner(found)
    if found == RECOMMENDED:
        from plywise.arena.methods.rules import make_recommended

        return make_recommended()
    if found in _HOMES:
        home = importlib.import_module(f"{__name__}.{_HOMES[found]}")
        return next(one for one in home.METHODS if one.name == found)
    if found:
        from plywise.arena.methods.peers import wrap_peer

        return wrap_peer(found)
    choices = (*METHODS, *_ALIASES)
    raise BenchError(
        f"No method is called {name!r}. {suggestion(name, choices)}There are: {', '.join(METHODS)}; any "
        "rule+optimizer or learner+rule; and module:name of an optimizer's or rule's class or a Method."
    )


def _load_method(address: str) -> Method:
    from plywise._util.import_path import load
    from plywise.arena.method import wrap_class
    from plywise.arena.methods.rules import wrap_rule
    from plywise.engine.rule import Rule

    thing = load(address, "your method")
    if isinstance(thing, type) and issubclass(thing, Rule):
        return wrap_rule(address, PEERS[0])
    return wrap_class(address, thing)


def _compose(name: str, first: str, second: str) -> Method:
    """Return a rule on an optimizer, or inside a learner."""
    one, other = _normalise_name(first), _normalise_name(second)
    if one in LEARNER_OF:
        known = other in RULE_OF or ":" in second
        _require(known, name, second, "rule", tuple(RULE_OF), "local-loss+foof")
        from plywise.arena.methods.learners import wrap_learner

        return wrap_learner(one, other or second)
    both = (*RULE_OF, *LEARNER_OF)
    known = one in RULE_OF or ":" in first
    _require(known, name, first, "rule or learner", both, "proxprop+adamw or local-loss+foof")
    known = other in PEERS or ":" in second
    _require(known, name, second, "optimizer", PEERS, f"{first}+adamw or {first}+torch.optim:RAdam")
    from plywise.arena.methods.rules import wrap_rule

    return wrap_rule(one or first, other or second)


def _require(right: bool, name: str, part: str, what: str, choices: tuple[str, ...], example: str) -> None:
    if not right:
        hint = f"{suggestion(part, choices)}There are: {', '.join(choices)}; as in {example}."
        raise BenchError(f"In {name!r}, {part!r} is no {what}. {hint}")


def _normalise_name(name: str) -> str:
    """Return the name as listed, or "" if there is none."""
    return _KNOWN.get(name.strip().lower().replace("-", "").replace("_", ""), "")
