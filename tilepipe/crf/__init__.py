"""Refinement of class probabilities by a conditional random field: its parameters, its kernels on CPU and CUDA."""
