"""Old address of `plywise.training.session`."""

from typing import TYPE_CHECKING

from plywise._util.renamed import serve_old_names
from plywise.training.session import Session, load_trained, open_session

__all__ = ["Session", "load_trained", "open_session"]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(__name__, {"trained": "load_trained"})
