"""From the lines of a ledger to results, rankings and conclusions: pure functions."""
