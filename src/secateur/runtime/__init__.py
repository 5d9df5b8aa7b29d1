"""Stores pruned models without their zeros, and runs them without zeros."""
