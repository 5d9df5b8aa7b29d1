"""Workflows connect the other rooms: a file, or a folder, for each verb.

The Python API (`secateur.prune`, `secateur.structure`, …) and the command line call the same
functions.
"""
