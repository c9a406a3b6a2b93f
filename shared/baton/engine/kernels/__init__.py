"""Kernels in C for what torch has no fast CPU operator for. They are compiled for the machine when an engine starts."""
