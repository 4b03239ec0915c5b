"""Rates of a job's parts on this machine: reading, network, kernels, writing, and all of it together."""
