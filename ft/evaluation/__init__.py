"""Loss and accuracy of a split, completions, perplexity."""
