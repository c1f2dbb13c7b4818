"""Old address of `plywise.registry.card`."""

from plywise.registry.card import Card, card_of

__all__ = ["Card", "card_of"]
