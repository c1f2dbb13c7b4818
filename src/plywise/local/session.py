"""Old address of `plywise.training.session`."""

from plywise.training.session import Session, open_session, trained

__all__ = ["Session", "open_session", "trained"]
