"""What users see of a rule at work: a row for each layer, and telemetry."""
