"""The rules that every trainer's recipe is tested with. One more rule is one more line."""

from collections.abc import Callable

from plywise import NLMS, RLS, AdaBK, BackMatching, Coordinates, Foof, ProxProp, Rule

RULES: dict[str, Callable[[], Rule]] = {
    "proxprop": ProxProp,
    "back_matching": lambda: BackMatching(cap=0.05),  # acts behind the page's clipping, on some of the layers
    "nlms": NLMS,
    "rls": RLS,  # always in backward
    "foof": lambda: Foof(stats_every=2, refresh_every=4),  # in backward, or in the step
    "adabk": lambda: AdaBK(stats_every=1, refresh_every=2),  # both sides
    "coordinates": lambda: Coordinates(stats_every=1, refresh_every=2),  # turns gradient and step
}
