"""tidepool: a Git repository of Python flows as a production Prefect platform on Kubernetes."""
