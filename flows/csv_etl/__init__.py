"""Integers from CSV to CSV: the smallest useful flow."""
