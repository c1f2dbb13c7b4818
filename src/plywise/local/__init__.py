"""Learning without one backward pass for all: blocks with objectives of their own. One file a paper."""
