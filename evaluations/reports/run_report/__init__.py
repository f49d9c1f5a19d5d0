"""A page about training runs: curves, previews, samples, metrics, configuration, provenance, in one HTML file."""
