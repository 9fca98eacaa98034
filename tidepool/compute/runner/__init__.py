"""Prefect task runs on a Dask cluster: the driver's side."""
