"""What `plywise demo` is."""
