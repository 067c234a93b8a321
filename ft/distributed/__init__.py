"""Several processes: ranks, sharding, launch by torchrun."""
