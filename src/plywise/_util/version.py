"""The version, for what may not import all of plywise."""

__version__ = "0.1.0"
