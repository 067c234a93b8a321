"""Fine-tuning GPT-2 in plain PyTorch; start reading in `ft/job.py`."""
