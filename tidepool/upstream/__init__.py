"""The only place that touches private parts of other packages."""
