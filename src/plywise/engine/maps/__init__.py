"""Kinds of linear maps."""
