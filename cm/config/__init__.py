"""Flags, presets and the registry of everything that has a name. Imports no torch."""
