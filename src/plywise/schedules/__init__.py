"""Schedules, one file for each paper: they change the training of single layers over time."""
