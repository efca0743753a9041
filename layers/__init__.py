"""Compiled sequence layers: filters of design models as scans, kernels and Equinox modules."""
