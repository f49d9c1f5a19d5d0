"""Samplers, editing, likelihoods and the noise that they draw."""
