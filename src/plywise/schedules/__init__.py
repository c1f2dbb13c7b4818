"""The schedules, one file a paper: what changes over the steps of a training, layer by layer."""
