"""Data that ships with the package, and readers."""
