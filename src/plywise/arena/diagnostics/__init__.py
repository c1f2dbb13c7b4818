"""What `plywise diagnose` is: layers before training, and advice."""
