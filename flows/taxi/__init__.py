"""New York taxi rides: tips."""
