"""Learning without a backward pass through the whole model: each block has its own objective."""
