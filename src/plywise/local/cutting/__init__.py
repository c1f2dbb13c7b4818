"""Reads a model as pieces between which it can be cut into blocks; `plywise.local.split` cuts it."""
