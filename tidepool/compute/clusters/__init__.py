"""Dask clusters: on this machine, or of Kubernetes pods."""
