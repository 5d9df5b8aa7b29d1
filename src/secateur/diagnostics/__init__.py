"""Diagnostics: checks whether a model is what it claims to be."""
