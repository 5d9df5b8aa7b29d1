"""`secateur compress` and `decompress`: the zeros leave the file, and come back."""
