"""Processes of a job: launchers, ranks, signals, signs of life, claims, logs. Knows nothing of models."""
