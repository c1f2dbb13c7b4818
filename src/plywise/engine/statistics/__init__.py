"""Running statistics of layers: when they are gathered and learned, where they are kept and saved."""
