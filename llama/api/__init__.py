"""What users pass, get and catch: parameters, outputs, errors. Runs without torch."""
