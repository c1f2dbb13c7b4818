"""Losses and penalties of the related papers, one file a paper."""
