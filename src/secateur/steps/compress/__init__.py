"""`secateur compress` and `decompress`: store a checkpoint without its zeros, and restore it."""
