"""One Prefect task run inside a Dask worker process."""
