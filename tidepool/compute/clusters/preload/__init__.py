"""Modules that Dask imports by name in its own processes (`--preload`)."""
