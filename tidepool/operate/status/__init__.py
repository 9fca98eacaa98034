"""The command `tidepool status`: what is wrong now, or how one flow run is, over Prefect server and Kubernetes."""
