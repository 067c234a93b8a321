"""Files: atomic writes, locks, manifests, the Hub."""
