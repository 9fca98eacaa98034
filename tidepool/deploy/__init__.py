"""From Git to the server: what prefect.yaml says, and what becomes of it."""
