"""Comparisons: methods, workloads, and what trains, scores and tells."""
