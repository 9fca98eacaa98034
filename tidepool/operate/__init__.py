"""Platform pods' entry points: the Dask operator, with its loops over Dask clusters, and the flow run's command."""
