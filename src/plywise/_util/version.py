"""The version, for code that must not import all of plywise."""

__version__ = "0.2.0.dev0"
