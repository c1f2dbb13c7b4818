"""What `plywise train` and `plywise pipeline` are."""
