"""Old address of `plywise.engine.call`."""

from plywise.engine.call import LinearCall as Ply
from plywise.engine.call import Update as Move

__all__ = ["Move", "Ply"]
