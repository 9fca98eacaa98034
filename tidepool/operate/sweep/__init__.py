"""Deletion of what runs leave behind: Dask clusters without a driver, and parts without a cluster."""
