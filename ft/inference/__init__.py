"""A fine-tuned model in use: classification and generation."""
