"""What examines the Triton kernels: compiles them for GPUs that are not there, counts what they cost, tunes them."""
