"""Training objectives, one file each, and their parts: pairs, distances, curricula."""
