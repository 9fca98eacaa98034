"""Platform pods' entry points: the Dask operator, with its loop over idle clusters, and the flow run's command."""
