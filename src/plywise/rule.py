"""Old address of `plywise.engine.rule`."""

from plywise.engine.rule import Observer, Rule, Size, require_choice, require_positive, require_whole

__all__ = ["Observer", "Rule", "Size", "require_choice", "require_positive", "require_whole"]
