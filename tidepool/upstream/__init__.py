"""The one seam to other packages: every private part of them that tidepool touches, a module per package.

Each entry says why it exists, which upstream issue or place to watch, and when it can be deleted. A behavioural test in
`tests/contract/test_upstream_<module>.py` pins each one; import-linter and ruff keep private names out of all other
modules. Modules are imported one by one, so that a Dask scheduler does not pay for Prefect.
"""
