"""The rules, one file a paper."""
