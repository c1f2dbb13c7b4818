"""The names of all methods that ship with plywise, and functions that find them."""
