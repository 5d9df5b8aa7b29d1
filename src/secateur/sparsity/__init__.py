"""Pure tensor maths: what to remove, and how to compensate for it.

No code here uses a model, a file or a configuration. The order of reading: `scores` → `allocation`
→ `patterns` → `refinements` → `solvers`, and `methods`, where the famous names are compositions.
"""
