"""A one-way learner spread over processes and hosts, on torch.distributed."""
