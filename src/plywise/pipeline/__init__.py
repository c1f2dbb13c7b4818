"""Trains a one-way learner in several processes and hosts, on torch.distributed."""
