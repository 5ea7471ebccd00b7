"""Finds, compiles, caches and chooses the C++ kernels of one-bit layers for this processor."""
