"""From workloads to a ledger of trials."""
