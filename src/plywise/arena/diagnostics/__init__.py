"""The implementation of `plywise diagnose`: it examines layers before training, and gives advice."""
