"""What looks after runs: status, clean-up, metrics."""
