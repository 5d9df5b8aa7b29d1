"""Kernels that multiply sparse matrices without expanding them; plain C in `csrc/`."""
