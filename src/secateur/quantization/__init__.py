"""Quantization: fewer bits for the weights that stay; zeros stay exactly zero."""
