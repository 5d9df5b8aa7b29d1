"""Recipes: everything a run depends on. The YAML file and the Python objects are one."""
