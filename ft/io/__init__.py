"""Files: atomic writes, direct I/O, locks, manifests, JSON, the Hub."""
