"""Calibration turns text into token windows, and these into statistics of each linear's inputs."""
