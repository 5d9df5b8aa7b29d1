"""Evaluation: what a model is worth, each number with the protocol it was measured by."""
