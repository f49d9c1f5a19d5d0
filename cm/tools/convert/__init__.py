"""Checkpoints of other code, to and from ours: EDM pickles, JAX msgpack files, diffusers folders, safetensors.

`cm.tools.convert.formats` finds out what a file is and does the whole conversion; each other module knows one layout.
"""
