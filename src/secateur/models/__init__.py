"""What a model is: where it comes from, how its files are laid out, and which of its parts can be cut.

The order of reading: `sources` → `checkpoint` → `skeleton` → `architecture` → `families`.
"""
