"""One way to walk a model: its layers in turn, recorded calls, halted forwards."""
