"""Tools for the Triton kernels: they compile them for GPUs that are not present, count their cost and tune them."""
