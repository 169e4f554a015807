"""Triton kernels and what launches them; ``gpu_backend`` is their door."""
