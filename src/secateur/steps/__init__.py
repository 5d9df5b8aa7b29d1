"""Workflows connect the other rooms. Each family of verbs has a folder.

The Python API (`secateur.prune`, `secateur.structure`, …) and the command line call the same
functions.
"""
