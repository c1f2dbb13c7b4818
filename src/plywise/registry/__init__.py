"""The names of all that ships, and how they are found."""
