"""A Dask cluster of Kubernetes pods, managed by the Dask operator."""
