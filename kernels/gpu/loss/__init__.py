"""Kernels of the decoder's loss alone: a tile's forward and backward are one call, so what either has made is there."""
