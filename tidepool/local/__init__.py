"""A Prefect server, the demo and single runs on this machine."""
