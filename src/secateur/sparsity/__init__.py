"""Pure tensor maths: what to remove, and how to make up for it.

Nothing in here knows a model, a file or a configuration. The order of reading:
`scores` → `allocation` → `patterns` → `refinements` → `solvers`, and `methods`, where the famous
names are compositions.
"""
