"""Evaluation: loss and accuracy, classification metrics, completions, perplexity."""
