"""Frames to one animated GIF."""
