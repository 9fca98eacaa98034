"""A plan as a table, Markdown or JSON."""
