"""Kernels that multiply sparse matrices without expanding them; plain C in `csrc/`.

They take a matrix of any format, because `Format.kept` gives them its mask and its values. A format
whose parts can be multiplied as they are stored brings a `Product` (`linear.py`).
"""
