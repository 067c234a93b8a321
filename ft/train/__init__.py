"""The training loop and what belongs to it: optimizer, schedule, state, metrics."""
