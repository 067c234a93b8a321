"""A trained model in the files of other programs, with the same results."""
