"""Parts of every kind, from a package that Secateur does not know.

Their memory is declared in whole MiB, so that a test finds each of them in the plan.
"""

MIB = 2**20
