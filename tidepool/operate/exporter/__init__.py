"""Metrics of the Prefect server's runs, schedules and work pools, for Prometheus: `tidepool exporter`."""
