"""Optimizers at work in other coordinates of the weights."""
