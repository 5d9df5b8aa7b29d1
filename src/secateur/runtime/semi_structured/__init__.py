"""Matrices for NVIDIA's sparse tensor cores: 2:4, and patterns that are rewritten as 2:4."""
