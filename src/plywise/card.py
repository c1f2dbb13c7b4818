"""Old address of `plywise.registry.card`."""

from typing import TYPE_CHECKING

from plywise._util.renamed import serve_old_names
from plywise.registry.card import Card, read_card

__all__ = ["Card", "read_card"]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(__name__, {"card_of": "read_card"})
