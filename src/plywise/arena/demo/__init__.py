"""The implementation of `plywise demo`."""
