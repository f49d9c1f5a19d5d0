"""Measurements and trials of the package itself: logic of scripts that users of a model do not need."""
