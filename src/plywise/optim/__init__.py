"""Optimizers of the related papers: each an ordinary `torch.optim.Optimizer`, one file a paper."""
