"""Allocation: how much sparsity does each linear get, so that the whole gets what was asked?

Uniform sparsity with exceptions by name is the engine's default; what is here finds other shares.
"""
