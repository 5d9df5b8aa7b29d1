"""Workflows: the only place where the rooms are wired together; a folder for each family of verbs.

The Python API (`secateur.prune`, `secateur.structure`, …) and the command line call the same
functions.
"""
