"""The files in Git: reading them, and every problem in them with its line."""
