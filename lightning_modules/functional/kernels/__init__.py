"""Warp kernels, one source for CPU and CUDA; each has a pure-torch twin that tests compare it with."""
