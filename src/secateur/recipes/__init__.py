"""Recipes: everything a run depends on, written down. The YAML file and the Python objects are one."""
