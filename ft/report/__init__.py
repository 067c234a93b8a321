"""What a run reports: console text, model card, HTML report."""
