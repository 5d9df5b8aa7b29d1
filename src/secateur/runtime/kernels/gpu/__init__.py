"""Kernels for GPUs, written in Triton. Only this folder imports triton."""
