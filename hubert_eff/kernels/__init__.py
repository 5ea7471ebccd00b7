"""The C++ kernels of one-bit layers: found, compiled once, cached, and chosen for this processor."""
