"""Computations on tensors: products, Gram matrices of patches, inverse roots, guarded solvers.

This package imports torch and nothing else of plywise.
"""
