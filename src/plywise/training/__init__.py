"""The implementation of `plywise train` and `plywise pipeline`."""
