"""Weights, checkpoints, mirrors and files on any storage."""
