"""Recipes: every option that a run depends on. A YAML file and the Python objects hold the same."""
