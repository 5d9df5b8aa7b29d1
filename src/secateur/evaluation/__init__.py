"""Evaluation: how good and how fast a model is. Each number comes with its protocol."""
