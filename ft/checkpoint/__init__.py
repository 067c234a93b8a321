"""Checkpoints and the run directory: written atomically, verified, resumed from."""
