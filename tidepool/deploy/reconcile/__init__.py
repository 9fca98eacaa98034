"""Desired state, actual state, the difference, and writing it."""
