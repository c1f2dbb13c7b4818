"""Old address of `plywise.engine.contract` and `plywise.engine.rule`."""

from plywise.engine.contract import Evidence, LayerShape, Shapes
from plywise.engine.contract import State as Memory
from plywise.engine.rule import StatefulRule as MemoryRule

__all__ = ["Evidence", "LayerShape", "Memory", "MemoryRule", "Shapes"]
