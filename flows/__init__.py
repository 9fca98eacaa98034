"""The flows: one folder per domain, `flow.py` (thin Prefect) and `transform.py` (pure)."""
