"""Weekly series: the best model, and next week."""
