"""Passes calibration through a model: layers in turn, recorded calls, halted forwards."""
