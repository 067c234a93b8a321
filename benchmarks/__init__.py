"""Benchmarks of `ft`, each a command: `python -m benchmarks.NAME --help`."""
