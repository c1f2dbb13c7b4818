"""Initial weights computed from data: closed forms of the related papers, one file for each paper."""

from plywise.init.fuse_layers import fuse_layers, fuse_slice

__all__ = ["fuse_layers", "fuse_slice"]
