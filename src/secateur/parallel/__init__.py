"""Several processes that do one run together: ranks, shares of the work, faults, and launchers."""
