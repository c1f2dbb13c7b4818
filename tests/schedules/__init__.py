"""The schedules: what they do to layers over the steps of a training."""
