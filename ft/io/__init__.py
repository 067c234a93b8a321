"""Files: atomic writes, locks, manifests, JSON, the Hub."""
