"""Flows that look after the platform itself."""
