"""Calibration: text → token windows → running statistics of the inputs of each linear."""
