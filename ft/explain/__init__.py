"""One training example on its way through one training step: the command `explain`."""
