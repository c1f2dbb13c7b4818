"""Captures calls of linear maps in the forward pass, and puts nodes for them into autograd's graph."""
