"""Modules of the related papers: each an ordinary `torch.nn.Module`, one file a paper."""
