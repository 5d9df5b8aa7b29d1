"""Training that keeps the zeros: gradual pruning, rounds with rewinding, adapters."""
