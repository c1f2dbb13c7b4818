"""Pure functions from the lines of a ledger to results, rankings and conclusions."""
